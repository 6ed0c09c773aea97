"""Checkpoints that earlier versions of this repository wrote, and what writes them."""
