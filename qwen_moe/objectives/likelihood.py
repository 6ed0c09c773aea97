"""Negative log-likelihood of the next token: pre-training, and supervised fine-tuning, which differ in their labels only."""

import torch

from parallel.sequence import Batch, SequenceShard
from qwen_moe.objectives.base import Objective


class Likelihood(Objective):
    """-log p of each valid label (not negative), in nats; divided by their number."""

    head = "cross_entropy"

    def count(self, batch: Batch, sequence: SequenceShard) -> torch.Tensor:
        return (batch["labels"] >= 0).sum()

    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return output.sum(), {}
