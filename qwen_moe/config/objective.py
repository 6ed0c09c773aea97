"""What a run minimizes, and what its losses mean to those that read them. No torch: the code is in `qwen_moe.objectives`."""

import math
from typing import Literal

from qwen_moe.config.fields import Section


class ObjectiveConfig(Section):
    """``likelihood``: the mean negative log-likelihood of valid labels: pre-training, and fine-tuning on answers."""

    kind: Literal["likelihood"] = "likelihood"

    @property
    def unit(self) -> str:
        """Of a loss."""
        return "nats per token"

    def loss_of_guessing(self, vocab_size: int) -> float:
        """A run that ends with a loss above this has learnt nothing."""
        return math.log(vocab_size)
