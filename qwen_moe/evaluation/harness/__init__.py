"""`qwen-moe evaluate tasks`: benchmarks and tasks of users through lm-evaluation-harness."""
