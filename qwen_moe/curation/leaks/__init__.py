"""Finds the text of test sets in training data (`qwen-moe data decontaminate`)."""
