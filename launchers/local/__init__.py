"""Runs on this machine, without Slurm: one or several at a time; the lock of a run folder."""
