"""`qwen-moe pipeline`: from the recipe of a large run to its job, with a ladder that finds its learning rate."""
