"""Heads after the last layer: the summed cross-entropy, or the log-probability of each label."""

from typing import Literal

Head = Literal["cross_entropy", "log_probs"]
