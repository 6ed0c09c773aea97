"""How the tokens of a sequence are split over ranks: the one description that layers, losses and data share.

A sequence is cut into ``cp`` parts, which stay apart from input to loss, and each of these into ``tp`` parts between the
layers (sequence parallelism, arXiv 2205.05198). Parts are contiguous and in order of rank. A batch arrives whole;
`of_batch` gives the rank its cp part.
Shapes: B batch, S sequence.
"""

from dataclasses import dataclass

import torch

from parallel.collectives import all_gather_single, all_reduce_sum, all_reduce_with_gradient
from parallel.mesh import Axis, Grids

# A micro-batch: fields [b, S] by name. The first stage of a model takes FIRST_INPUT; every stage and the loss get the rest.
Batch = dict[str, torch.Tensor]
FIRST_INPUT = "input_ids"

ALONE = Axis("alone", 1, 0, None)


@dataclass(frozen=True)
class SequenceShard:
    """This rank's part of every sequence. The default is all of it."""

    tp: Axis = ALONE
    cp: Axis = ALONE

    @classmethod
    def of(cls, grids: Grids) -> "SequenceShard":
        return cls(grids.tp, grids.cp)

    @property
    def parts(self) -> int:
        """Into how many parts a sequence is cut between layers."""
        return self.tp.size * self.cp.size

    def length(self, whole: int) -> int:
        """Tokens of a sequence of ``whole`` tokens that this rank holds between layers."""
        return whole // self.parts

    def tokens(self, given: torch.Tensor) -> int:
        """Tokens of whole sequences of which this rank is given ``given [B, S / cp]``."""
        return given.numel() * self.cp.size

    def of_batch(self, batch: Batch) -> Batch:
        """The cp part of each field ``[B, S]``: what the model is given."""
        if self.cp.size == 1:
            return batch
        return {name: field.chunk(self.cp.size, dim=1)[self.cp.index] for name, field in batch.items()}

    def held(self, field: torch.Tensor) -> torch.Tensor:
        """``[B, S / parts]``: of a field ``[B, S / cp]`` that the model is given, the tokens that this rank holds between
        layers, and gives the log-probabilities of."""
        return field if self.tp.size == 1 else field.chunk(self.tp.size, dim=1)[self.tp.index]

    def row_sums(self, x: torch.Tensor) -> torch.Tensor:
        """``[B]``: each sequence's sum of ``x [B, S / parts]`` over all ranks that hold parts of it. Differentiable. A loss
        of it is the same on each of those ranks: `share` makes it one loss."""
        return all_reduce_with_gradient(all_reduce_with_gradient(x.sum(1), self.tp), self.cp)

    def share(self, loss: torch.Tensor) -> torch.Tensor:
        """This rank's share of a loss that all ranks of a sequence have computed alike."""
        return loss / self.parts

    def given_length(self, held: int) -> int:
        """S / cp, the length of what the model is given, from what a rank holds between layers."""
        return held * self.tp.size

    def whole_length(self, held: int) -> int:
        """S, the length of the whole sequence, from what a rank holds between layers."""
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
        """``[given]``: positions of what the model is given. With a cache (``past`` > 0) cp must be 1."""
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
