"""The run folder: what a run writes about itself, and how it is read."""
