"""Training objectives and expert load balancing."""
