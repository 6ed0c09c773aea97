"""Slurm: its commands, the site file, the script of a job, and the checks before it is submitted."""
