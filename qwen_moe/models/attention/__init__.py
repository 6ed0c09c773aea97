"""Attention: projections, what a query may see, and who computes the scores."""
