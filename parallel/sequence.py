"""How the tokens of a sequence are split over ranks: one description that layers, losses and data share.

A sequence is cut into ``cp`` parts, which stay apart from input to loss. Between layers each of these is cut into ``tp``
parts (sequence parallelism, arXiv 2205.05198). Parts are contiguous and in rank order. A batch arrives whole; `of_batch`
selects this rank's cp part. The model's input has length S / cp ("given"); a rank holds S / (cp * tp) tokens between
layers ("held"). Shapes: B batch, S sequence.
"""

from dataclasses import dataclass

import torch

from parallel.collectives import all_gather_single, all_reduce_sum, all_reduce_with_gradient
from parallel.mesh import Axis, Grids

# A micro-batch: fields [b, S] by name. The first stage takes FIRST_INPUT; every stage and the loss get the other fields.
Batch = dict[str, torch.Tensor]
FIRST_INPUT = "input_ids"

ALONE = Axis("alone", 1, 0, None)


@dataclass(frozen=True)
class SequenceShard:
    """This rank's part of every sequence. The default is the whole sequence."""

    tp: Axis = ALONE
    cp: Axis = ALONE

    @classmethod
    def of(cls, grids: Grids) -> "SequenceShard":
        return cls(grids.tp, grids.cp)

    @property
    def parts(self) -> int:
        """The number of parts that a sequence is cut into between layers."""
        return self.tp.size * self.cp.size

    def length(self, whole: int) -> int:
        """Tokens of a sequence of ``whole`` tokens that this rank holds between layers."""
        return whole // self.parts

    def tokens(self, given: torch.Tensor) -> int:
        """The number of tokens in the whole sequences, B * S, from this rank's input ``given [B, S / cp]``."""
        return given.numel() * self.cp.size

    def of_batch(self, batch: Batch) -> Batch:
        """This rank's cp part ``[B, S / cp]`` of each field ``[B, S]``: the model's input."""
        if self.cp.size == 1:
            return batch
        return {name: field.chunk(self.cp.size, dim=1)[self.cp.index] for name, field in batch.items()}

    def held(self, field: torch.Tensor) -> torch.Tensor:
        """``[B, S / cp] -> [B, S / parts]``: the tokens of an input field that this rank holds between layers. The
        log-probability head returns values for these tokens."""
        return field if self.tp.size == 1 else field.chunk(self.tp.size, dim=1)[self.tp.index]

    def row_sums(self, x: torch.Tensor) -> torch.Tensor:
        """``[B]``: each sequence's sum of ``x [B, S / parts]`` over all ranks that hold parts of it. Differentiable. All
        those ranks compute the same loss from it; use `share` to count that loss once."""
        return all_reduce_with_gradient(all_reduce_with_gradient(x.sum(1), self.tp), self.cp)

    def share(self, loss: torch.Tensor) -> torch.Tensor:
        """This rank's share of a loss that all ranks of a sequence have computed identically."""
        return loss / self.parts

    def given_length(self, held: int) -> int:
        """S / cp, the length of the model's input, from the length that a rank holds between layers."""
        return held * self.tp.size

    def whole_length(self, held: int) -> int:
        """S, the length of the whole sequence, from the length that a rank holds between layers."""
        return held * self.parts

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` summed over all ranks that hold parts of the same sequences. Not differentiable."""
        return all_reduce_sum(all_reduce_sum(x, self.tp), self.cp)

    def earlier(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of ``counts`` over the ranks that hold earlier parts of the sequences. Not differentiable."""
        before = _prefix(counts, self.tp)
        if self.cp.size == 1:
            return before
        return before + _prefix(all_reduce_sum(counts, self.tp), self.cp)

    def positions(self, given: int, past: int, device: torch.device) -> torch.Tensor:
        """``[given]``: positions of the model's input. With a cache (``past`` > 0) cp must be 1."""
        assert past == 0 or self.cp.size == 1
        begin = past + self.cp.index * given
        return torch.arange(begin, begin + given, device=device)


def _prefix(counts: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of ``counts`` over the ranks before this one on ``axis`` (zeros on the first)."""
    if axis.size == 1:
        return torch.zeros_like(counts)
    gathered = counts.new_empty(axis.size, *counts.shape)
    all_gather_single(gathered.flatten(0, 1), counts.contiguous(), group=axis.group)
    return gathered[: axis.index].sum(0)
