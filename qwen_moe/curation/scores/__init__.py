"""`qwen-moe data score`: scores of documents in several dimensions, and their domains."""
