"""Runs on a cluster: the verbs `launch`, `status`, `logs`, `cancel`, and the programs that run on each node."""
