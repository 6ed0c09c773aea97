"""Negative log-likelihood of the next token, for pre-training and supervised fine-tuning (they differ only in labels)."""

import torch

from parallel.sequence import Batch, SequenceShard
from qwen_moe.objectives.base import Objective


class Likelihood(Objective):
    """The sum of -log p over valid (non-negative) labels, in nats, divided by their number."""

    head = "cross_entropy"

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"] >= 0).sum()

    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return output.sum(), {}
