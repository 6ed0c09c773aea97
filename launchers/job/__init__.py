"""The job itself: attempts until the run is done, what nodes and ranks report, and what is decided from it."""
