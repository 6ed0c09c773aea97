"""Tasks for lm-evaluation-harness whose texts every machine has: a YAML file for each, and the functions that they name."""
