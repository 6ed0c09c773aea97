"""Context parallelism: every sequence is cut into 2n chunks, and rank r of n holds chunks r and 2n - 1 - r, in that order
("zigzag", as Megatron-core does). Under a causal mask all ranks then have the same number of visible query-key pairs.

Any n / p neighboring ranks together hold a zigzag part over p, so the same cut serves an exchange of heads (Ulysses,
arXiv 2309.14509) within a node and a ring or all-gather between nodes. Shapes: B batch, S whole sequence, s = S / n.
"""

import torch
import torch.distributed as dist

from parallel.collectives import Pending
from parallel.mesh import Axis


def chunks_of(index: int, size: int) -> tuple[int, int]:
    """The two chunks, out of ``2 * size``, that rank ``index`` holds."""
    return index, 2 * size - 1 - index


def own_chunks(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part ``[B, S / n, ...]`` of ``x [B, S, ...]``."""
    if axis.size == 1:
        return x
    chunks = x.chunk(2 * axis.size, dim=1)
    return torch.cat([chunks[chunk] for chunk in chunks_of(axis.index, axis.size)], dim=1)


def join_chunks(parts: torch.Tensor) -> torch.Tensor:
    """Parts ``[n, B, s, ...]`` of neighboring ranks -> their tokens ``[B, n * s, ...]`` in the order of the sequence."""
    first, second = parts.chunk(2, dim=2)
    return torch.cat([*first.unbind(0), *second.flip(0).unbind(0)], dim=1)


def split_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `join_chunks`: ``[B, n * s, ...] -> [n, B, s, ...]``."""
    chunks = x.chunk(2 * size, dim=1)
    return torch.stack([torch.cat([chunks[chunk] for chunk in chunks_of(i, size)], dim=1) for i in range(size)])


def start_shift(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to send ``x`` to the next rank of the ring and receive the previous rank's. It is an all-to-all, not a pair of
    messages, so that the flight recorder sees it with gloo too."""
    x = x.contiguous()
    buffer = torch.empty_like(x)
    sent, received = [0] * axis.size, [0] * axis.size
    sent[(axis.index + 1) % axis.size] = received[(axis.index - 1) % axis.size] = x.numel()
    work = dist.all_to_all_single(buffer.view(-1), x.view(-1), received, sent, group=axis.group, async_op=True)
    return Pending(work, buffer, x)


def _exchange(parts: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[n, ...]``: part i goes to rank i; part i of the result is from rank i."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=axis.group)
    return received


def _to_heads(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[B, s, n, H, C] -> [B, n * s, H, C]``: all tokens, this rank's heads."""
    return join_chunks(_exchange(x.movedim(2, 0), axis))


def _to_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[B, n * s, H, C] -> [B, s, n, H, C]``: this rank's tokens, all heads."""
    return _exchange(split_chunks(x, axis.size), axis).movedim(0, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _to_heads(x, axis)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _to_tokens(grad_outputs[0], ctx.axis), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _to_tokens(x, axis)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _to_heads(grad_outputs[0], ctx.axis), None


def gather_tokens_split_heads(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[B, s, n, H, C] -> [B, n * s, H, C]``: rank i gets group i of the heads, for the tokens of all ranks in the order of
    the sequence. One all-to-all, as is its backward."""
    return _ToHeads.apply(x, axis)


def split_tokens_gather_heads(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The inverse: ``[B, n * s, H, C] -> [B, s, n, H, C]``."""
    return _ToTokens.apply(x, axis)
