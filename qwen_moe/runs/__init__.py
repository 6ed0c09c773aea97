"""The run folder: what a run records about itself, and how it is read."""
