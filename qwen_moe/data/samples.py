"""What any source of samples gives a run: micro-batches by the number of their first sample, and which rank reads which.

A micro-batch (`parallel.sequence.Batch`) holds tensors ``[b, S]`` by name:

input_ids     int64, the tokens
labels        int64, the token that follows each, or IGNORE where it counts in no loss
position_ids  int64, optional: positions, from 0 in each document
document_starts  int64, optional: the index in the sequence of each document's first token; attention looks no further back
counted       bool, optional: false for padding, which is in no statistic of the experts and in no auxiliary loss. Padding is
              the last document of a sequence, without valid labels
experts       int16 ``[b, S, L, K]``, optional: routing replay, the experts of each token in every MoE layer of the model,
              or -1 where the router selects them itself (`qwen_moe.data.replay`)

and whatever else the objective reads (`Objective.fields`).
"""

from typing import Protocol

import torch

from parallel.sequence import Batch

IGNORE = -100


def documents_of(ends: torch.Tensor) -> Batch:
    """``position_ids`` and ``document_starts`` of sequences whose documents end where ``ends [b, S]`` is true."""
    index = torch.arange(ends.shape[1]).expand_as(ends)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(ends[:, :-1], index[:, 1:], 0)
    starts = begins.cummax(1).values
    return {"position_ids": index - starts, "document_starts": starts}


class Ordered(Protocol):
    """What a run reads, in an order. ``fingerprint`` decides all of it."""

    fingerprint: str

    def is_of_this_data(self, fingerprint: str, train_samples: int | None = None) -> bool:
        """Whether ``fingerprint`` is that of these samples, or of these in the order for ``train_samples``."""

    def begins_as(self, train_samples: int, samples: int) -> bool:
        """Whether the first ``samples`` are those of the order for ``train_samples``. All ranks call."""


class Samples(Ordered, Protocol):
    """Training and validation samples of a run, addressed by number: batch k is the same whatever the number of ranks, so
    that a resumed run needs only its step."""

    validation_samples: int

    def train_batch(self, first: int, count: int) -> Batch:
        """Training samples ``first`` and following as one micro-batch."""

    def validation_batch(self, first: int, count: int) -> Batch:
        """Validation samples; rows past the last have labels IGNORE."""


def rank_samples(
    step: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[tuple[int, int]]:
    """(first sample, count) of each micro-batch of one rank in optimizer step ``step``. Over all ranks they are the
    global batch, whatever the split; micro-batch m of rank r takes the m-th stretch of dp_size micro-batches."""
    first = step * global_batch_size
    stretch = micro_batch_size * dp_size
    return [
        (first + m * stretch + dp_rank * micro_batch_size, micro_batch_size)
        for m in range(global_batch_size // stretch)
    ]
