"""Reads prompts and continues them: the cache, sampling, batches, and the verb `qwen-moe generate`."""
