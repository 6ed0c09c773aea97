"""How the tokens of a sequence are split over ranks: one description that layers, losses and data share.

A sequence is cut into ``cp`` parts, which stay apart from input to loss; each is two chunks of the sequence
(`parallel.context`). Between layers each of these parts is cut into ``tp`` contiguous ones, in rank order (sequence
parallelism, arXiv 2205.05198). A batch arrives whole; `of_batch` selects this rank's cp part. The model's input has length
S / cp ("given"); a rank holds S / (cp * tp) tokens between layers ("held"). Shapes: B batch, S sequence.
"""

from dataclasses import dataclass

import torch

from parallel.collectives import all_gather_single, all_reduce_sum, all_reduce_with_gradient
from parallel.context import chunks_of, own_chunks
from parallel.mesh import Axis, Grids

# A micro-batch: fields [b, S, ...] by name. The first stage takes FIRST_INPUT; every stage and the loss get the others.
Batch = dict[str, torch.Tensor]
FIRST_INPUT = "input_ids"
WHOLE = ("document_starts", "counted")  # fields that describe the whole sequence to every rank

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
        """The model's input: this rank's cp part ``[B, S / cp, ...]`` of each field, and all of the fields WHOLE."""
        return {name: field if name in WHOLE else own_chunks(field, self.cp) for name, field in batch.items()}

    def held(self, field: torch.Tensor) -> torch.Tensor:
        """``[B, S / cp, ...] -> [B, S / parts, ...]``: the tokens of an input field that this rank holds between layers. The
        log-probability head returns values for these tokens."""
        return field if self.tp.size == 1 else field.chunk(self.tp.size, dim=1)[self.tp.index]

    def held_of(self, whole: torch.Tensor) -> torch.Tensor:
        """``[B, S] -> [B, S / parts]``: the tokens of a field of whole sequences that this rank holds between layers."""
        return self.held(own_chunks(whole, self.cp))

    def row_sums(self, x: torch.Tensor) -> torch.Tensor:
        """``[B]``: each sequence's sum of ``x [B, S / parts]`` over all ranks that hold parts of it. Differentiable. All
        those ranks compute the same loss from it; use `share` to count that loss once."""
        return all_reduce_with_gradient(all_reduce_with_gradient(x.sum(1), self.tp), self.cp)

    def document_sums(self, x: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """``[B, N, ...]``, float64: each document's sum of ``x [B, S / parts, ...]`` over all ranks that hold parts of it.

        ``documents [B, S]`` is `document_numbers` of the whole rows; N is the largest number of documents in a row.
        Differentiable; `share` counts it once, as for `row_sums`. Tokens are added in order, so that a document's sum does
        not depend on what it is packed with.
        """
        held = self.held_of(documents)
        lengths = torch.zeros(held.shape[0], int(documents.max()) + 1, dtype=torch.int64, device=held.device)
        lengths.scatter_add_(1, held, torch.ones_like(held))
        # Not index_add: on a GPU it adds in any order. A rank's tokens are in the order of the sequence, so the tokens that
        # it holds of a document are neighbours.
        sums = torch.segment_reduce(x.double(), "sum", lengths=lengths, axis=1, unsafe=True)
        return all_reduce_with_gradient(all_reduce_with_gradient(sums, self.tp), self.cp)

    def of_documents(self, values: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """``[B, N] -> [B, S / parts]``: each held token's value of its document."""
        return values.gather(1, self.held_of(documents))

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

    @property
    def segments(self) -> int:
        """The number of equal, contiguous segments that the tokens held by a rank consist of."""
        return 1 if self.cp.size == 1 else 2

    def earlier(self, counts: torch.Tensor) -> torch.Tensor:
        """For each of this rank's segments, the sum of ``counts [B, segments, ...]`` over all earlier segments of the same
        sequences, on any rank. Not differentiable."""
        if self.parts == 1:
            return torch.zeros_like(counts)
        everywhere = _gather(_gather(counts, self.tp), self.cp)  # [cp, tp, B, segments, ...]
        by_segment = everywhere.movedim(3, 2).flatten(0, 2)  # [cp * tp * segments, B, ...]
        ranks = [(cp, tp) for cp in range(self.cp.size) for tp in range(self.tp.size)]
        places = [self._place(*rank, segment) for rank in ranks for segment in range(self.segments)]
        mine = [self._place(self.cp.index, self.tp.index, segment) for segment in range(self.segments)]
        order = torch.tensor([[place < own for place in places] for own in mine])
        before = order.to(counts.device, non_blocking=True)  # torch.tensor(device=) would wait for a GPU
        return (before.view(len(mine), -1, *[1] * (counts.ndim - 1)) * by_segment).sum(1).movedim(0, 1)

    def _place(self, cp: int, tp: int, segment: int) -> int:
        """The place of a rank's segment in the sequence."""
        if self.cp.size == 1:
            return tp
        chunk, within = divmod(2 * tp + segment, self.tp.size)  # of this cp rank's two chunks, each of tp segments
        return chunks_of(cp, self.cp.size)[chunk] * self.tp.size + within

    def positions(self, given: int, device: torch.device) -> torch.Tensor:
        """``[given]``: positions of the model's input."""
        if self.cp.size == 1:
            return torch.arange(given, device=device)
        return own_chunks(torch.arange(given * self.cp.size, device=device)[None], self.cp)[0]


def document_numbers(document_starts: torch.Tensor) -> torch.Tensor:
    """``[B, S]``: the number within its row, from 0, of each token's document. ``document_starts``: the index of its
    first token."""
    begins = document_starts == torch.arange(document_starts.shape[1], device=document_starts.device)
    return begins.cumsum(1) - 1


def _gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[n, ...]``: every rank's ``x``."""
    if axis.size == 1:
        return x[None]
    gathered = x.new_empty(axis.size, *x.shape)
    all_gather_single(gathered.flatten(0, 1), x.contiguous(), group=axis.group)
    return gathered
