"""`qwen-moe pipeline`: from a recipe of a large run to its job, through the ladder that its learning rate is read from."""
