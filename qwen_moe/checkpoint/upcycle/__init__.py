"""Upcycling: a mixture-of-experts checkpoint from the weights of a dense model (`qwen-moe convert upcycle`)."""
