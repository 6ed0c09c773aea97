"""Scores of conversations by a reward model: `qwen-moe score`, and `ScoringModel` for other code."""
