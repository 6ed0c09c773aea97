"""Checkpoints to and from Hugging Face directories."""
