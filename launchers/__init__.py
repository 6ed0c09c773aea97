"""Starting processes, here or on a cluster. Standard library only."""
