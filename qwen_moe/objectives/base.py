"""The contract of an objective: the batch fields that it reads, the last stage's output, and a loss that is a sum.

Every value is a sum over this rank's share of the batch. The trainer sums over micro-batches, data-parallel ranks and parts
of a sequence, and divides once by `count`, so that the layout does not change a mean.
Shapes: b sequences per micro-batch, S tokens per sequence, s of them held by this rank (`SequenceShard.length`).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from parallel.sequence import Batch, SequenceShard
from qwen_moe.models.head import Head

# What says where packed documents and padding are (qwen_moe/data/samples.py).
PACKED = ("document_starts", "position_ids", "counted")


class Objective(ABC):
    """``head``: the last stage's output for a micro-batch. ``cross_entropy [1]`` is the sum over valid tokens, computed with
    its gradient in one pass; ``log_probs [b, s]`` are the labels' log-probabilities, each with its own upstream gradient.

    ``fields``: batch fields ``[b, S]`` that must be there besides ``labels``. ``metrics``: names of the sums that `loss`
    returns for the record; the trainer divides these by `count` too. ``maxima``: names of the figures that `loss` also
    returns, of which the trainer records the largest. ``may_be_empty``: a global batch without anything to learn is no
    mistake; its step changes nothing.
    """

    head: ClassVar[Head]
    fields: tuple[str, ...] = ()
    may_be_empty: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ()
    maxima: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def count(self, batch: Batch) -> torch.Tensor:
        """The number that a step's losses are divided by: one micro-batch's share ``[]`` of it, int64. ``batch`` is whole,
        with the tokens of all cp ranks."""

    @abstractmethod
    def loss(
        self, output: torch.Tensor, batch: Batch, sequence: SequenceShard
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This rank's share ``[]`` of the micro-batch's summed loss, and of its `metrics`; and its `maxima`. ``batch`` is
        the model's input (this cp rank's part); `SequenceShard.held` cuts a field to the tokens of ``output``."""
