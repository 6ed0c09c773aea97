"""The core of context parallelism: attention to keys of other ranks, as a ring, an all-gather or an exchange of heads.

A rank holds two chunks of each sequence (`parallel.context`). What its queries see of other ranks' keys is a list of pieces
(`models.attention.mask`), so documents of any length need no mask and no padding. Only this rank's q, k, v and output are
saved for backward, which communicates the keys and values again.

Shapes: B batch, S whole sequence, n ranks, s = S / n, H query heads, G key/value heads, C head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.collectives import all_gather_single, reduce_scatter
from parallel.context import (
    chunks_of,
    gather_tokens_split_heads,
    join_chunks,
    split_chunks,
    split_tokens_gather_heads,
    start_shift,
)
from parallel.mesh import Axis
from qwen_moe.models.attention.core import attend
from qwen_moe.models.attention.mask import Piece, Span, Visibility
from qwen_moe.models.ops.piece_attention import Gradients, Partial
from qwen_moe.sharding.layout import CpKind


def spans(index: int, size: int, held: int) -> tuple[Span, Span]:
    """The tokens of rank ``index``: two chunks, together ``held`` tokens."""
    chunk = held // 2
    first, second = chunks_of(index, size)
    return Span(first * chunk, (first + 1) * chunk, 0), Span(second * chunk, (second + 1) * chunk, chunk)


def _gathered(k: torch.Tensor, v: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, S, G, C]`` of all ranks, in the order of the sequence."""
    both = torch.stack([k, v])
    parts = both.new_empty(axis.size, *both.shape)
    all_gather_single(parts.flatten(0, 1), both, group=axis.group)
    return join_chunks(parts[:, 0]), join_chunks(parts[:, 1])


class _GatherAttention(torch.autograd.Function):
    """forward: all-gather k and v, then attend. backward: all-gather them again; reduce-scatter (sum) dk and dv."""

    @staticmethod
    def forward(
        ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: tuple[Piece, ...], scale: float, axis: Axis
    ) -> torch.Tensor:
        keys, values = _gathered(k, v, axis)
        found = Partial(q).add(q, keys, values, pieces, scale)
        y = found.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, found.lse)
        ctx.pieces, ctx.scale, ctx.axis = pieces, scale, axis
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        keys, values = _gathered(k, v, ctx.axis)
        found = Gradients(q, keys).add(grad_outputs[0], (q, keys, values, y, lse), ctx.pieces, ctx.scale)
        both = torch.stack([split_chunks(x, ctx.axis.size) for x in (found.dk, found.dv)], dim=1)
        mine = reduce_scatter(both.flatten(0, 1), ctx.axis)
        return found.dq.to(q.dtype), mine[0].to(k.dtype), mine[1].to(v.dtype), None, None, None


class _RingAttention(torch.autograd.Function):
    """forward: k and v travel once around the ring while each rank attends to those that it has. backward: they travel
    again, followed by the sums of their gradients, which end on the rank that owns them."""

    @staticmethod
    def forward(
        ctx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pieces: Sequence[tuple[Piece, ...]],
        scale: float,
        axis: Axis,
    ) -> torch.Tensor:
        found, both = Partial(q), torch.stack([k, v])
        for turn in range(axis.size):
            coming = start_shift(both, axis) if turn < axis.size - 1 else None
            found.add(q, both[0], both[1], pieces[(axis.index - turn) % axis.size], scale)
            both = coming.wait() if coming is not None else both
        y = found.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, found.lse)
        ctx.pieces, ctx.scale, ctx.axis = pieces, scale, axis
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        axis, both = ctx.axis, torch.stack([k, v])
        found = Gradients(q, k)
        sums: Any = None
        for turn in range(axis.size):
            coming = start_shift(both, axis) if turn < axis.size - 1 else None
            found.dk.zero_()
            found.dv.zero_()
            found.add(
                grad_outputs[0], (q, both[0], both[1], y, lse), ctx.pieces[(axis.index - turn) % axis.size], ctx.scale
            )
            own = torch.stack([found.dk, found.dv])
            if sums is not None:
                own += sums.wait()
            sums = start_shift(own, axis)
            both = coming.wait() if coming is not None else both
        dk, dv = sums.wait()
        return found.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


@dataclass(frozen=True)
class ContextAttention:
    """The attention core (`models.attention.core.Attend`) of a rank of ``outer`` x ``heads``.

    First the ranks of ``heads`` exchange their tokens for a share of the heads. Then ``kind`` brings the keys of the other
    ranks of ``outer``. Either axis may have size 1. Documents are given for the whole sequence.
    """

    kind: CpKind
    outer: Axis
    heads: Axis

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scale: float
    ) -> torch.Tensor:
        if self.heads.size == 1:
            return self._attend(q, k, v, visible, scale)
        size, groups = self.heads.size, k.shape[2]
        if groups < size:  # each rank needs a whole head
            k, v = (x.repeat_interleave(size // groups, 2) for x in (k, v))
        by_rank = [x.unflatten(2, (size, -1)) for x in (q, k, v)]
        counts = [x.shape[3] for x in by_rank]
        q, k, v = gather_tokens_split_heads(torch.cat(by_rank, 3), self.heads).split(counts, 2)
        y = self._attend(q, k, v, visible, scale)
        return split_tokens_gather_heads(y, self.heads).flatten(2, 3)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scale: float
    ) -> torch.Tensor:
        axis, held = self.outer, q.shape[1]
        if axis.size == 1:
            return attend(q, k, v, visible, scale)
        mine = spans(axis.index, axis.size, held)
        if self.kind == "all_gather":
            whole = (Span(0, held * axis.size, 0),)
            return _GatherAttention.apply(q, k, v, visible.pieces(mine, whole), scale, axis)
        by_rank = [visible.pieces(mine, spans(rank, axis.size, held)) for rank in range(axis.size)]
        return _RingAttention.apply(q, k, v, by_rank, scale, axis)
