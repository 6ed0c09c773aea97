"""A launched run's files in its run folder, and how they are read."""
