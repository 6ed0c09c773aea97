"""`qwen-moe post-train`: from a model to a fine-tuned one that has learned from pairs and from its own samples."""
