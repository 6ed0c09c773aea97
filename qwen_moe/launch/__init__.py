"""Runs on a cluster: the verbs `launch`, `status`, `logs`, `cancel`, and what they start on each node."""
