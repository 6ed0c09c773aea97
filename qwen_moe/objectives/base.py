"""The contract of an objective: what it reads of a batch, what the last stage gives it, and a loss that is a sum.

Everything is a sum over this rank's share of the batch: of micro-batches, of data-parallel ranks, of the parts of a
sequence. The trainer adds up and divides once, by `count`, so that no layout changes a mean.
Shapes: b sequences of a micro-batch, S tokens of a sequence, `s` those that this rank holds (`SequenceShard.length`).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from parallel.sequence import Batch, SequenceShard
from qwen_moe.models.head import Head


class Objective(ABC):
    """``head``: what the last stage gives for a micro-batch. ``cross_entropy`` is the sum over valid tokens, ``[1]``, formed
    with its gradient in one pass; ``log_probs [b, s]`` are those of the labels, each with a gradient of its own.

    ``fields``: names of what `loss` reads of a batch beside ``labels``, each ``[b, S]``. ``metrics``: names of the sums that
    `loss` gives for the record; the trainer divides them by `count` as well.
    """

    head: ClassVar[Head]
    fields: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def count(self, batch: Batch, sequence: SequenceShard) -> torch.Tensor:
        """What the losses of a step are divided by: this cp rank's share ``[]`` of a micro-batch, int64."""

    @abstractmethod
    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This rank's share ``[]`` of the micro-batch's summed loss, and of its `metrics`. ``batch`` is what the model was
        given; `SequenceShard.held` cuts a field to the tokens of ``output``."""
