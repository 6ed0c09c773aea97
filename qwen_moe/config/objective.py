"""The objective that a run minimizes, and the meaning of its losses. No torch: `qwen_moe.objectives` computes it."""

import math
from typing import Literal

from qwen_moe.config.fields import Section


class ObjectiveConfig(Section):
    """``likelihood``: the mean negative log-likelihood of valid labels, for pre-training and for fine-tuning on answers."""

    kind: Literal["likelihood"] = "likelihood"

    @property
    def unit(self) -> str:
        """The unit of a loss."""
        return "nats per token"

    def loss_of_guessing(self, vocab_size: int) -> float:
        """The loss of uniform guessing. A run that ends above it has learned nothing."""
        return math.log(vocab_size)
