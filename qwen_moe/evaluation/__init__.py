"""Evaluation of trained models; the verb `qwen-moe evaluate`."""
