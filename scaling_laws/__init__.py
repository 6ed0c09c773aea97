"""Scaling laws from tables of training runs: learning rate, batch size and loss, with uncertainty. Never imports torch."""
