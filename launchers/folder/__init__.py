"""What a run folder holds of a launched run, and how it is read."""
