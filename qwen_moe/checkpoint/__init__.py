"""Checkpoints: atomic directories, sharded state through DCP, conversion to and from Hugging Face."""
