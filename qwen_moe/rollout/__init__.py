"""Post-training's sampling side: queries, sampled answers, their rewards, and pairs of answers."""
