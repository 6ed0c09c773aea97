"""Checks in float64, on this machine, that a parallel layout computes the same as one process."""
