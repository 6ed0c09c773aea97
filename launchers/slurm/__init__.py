"""Slurm: its commands, the site file, the script of a job, and what is refused before one is submitted."""
