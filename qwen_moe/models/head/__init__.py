"""Heads after the last layer: the summed cross-entropy, the log-probability of each label, or scores of each token."""

from typing import Literal

Head = Literal["cross_entropy", "log_probs", "scores"]
