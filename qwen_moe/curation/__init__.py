"""Curation of text: filters, scores, domains, deduplication, leaks of tests."""
