"""Tensor-parallel layers with sequence parallelism (arXiv 1909.08053, 2205.05198).

Between layers every rank holds its part ``[B, S / n, D]`` of the sequence. A block gathers it, works on its own
columns, and reduce-scatters the partial sums of its rows. Shapes: T tokens, V vocabulary, A/O input/output features.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from parallel.collectives import (
    all_gather_single,
    join_sequence,
    reduce_scatter_sequence,
    reduce_scatter_single,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from parallel.gemm import affine, linear, widen
from parallel.mesh import Axis

IGNORE = -100


def split_range(size: int, axis: Axis) -> tuple[int, int]:
    """(first, count) of this rank's part when ``size`` things are dealt out in order, the first ranks taking one more."""
    each, more = divmod(size, axis.size)
    first = axis.index * each + min(axis.index, more)
    return first, each + (axis.index < more)


class _ColumnParallel(torch.autograd.Function):
    """y_i = gather(x) W_i^T + b_i for several W_i at the cost of one gather.

    backward: dx = reduce-scatter(sum_i dy_i W_i), dW_i = dy_i^T gather(x). Only this rank's part of x is saved: it is
    gathered again while dx is computed, and dx is reduce-scattered while the dW_i are.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.axis = axis
        ctx.save_for_backward(x, *weights)
        full = widen(join_sequence(start_gather_sequence(x, axis).wait()))
        return tuple(affine(full, w, b) for w, b in zip(weights, biases, strict=True) if w is not None)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_weights, need_biases = need[2::2], need[3::2]
        gather = start_gather_sequence(x, ctx.axis) if any(need_weights) else None
        scatter = None
        grad_wide = [widen(dy) for dy in grad_outputs]
        if need[0]:
            dx = grad_wide[0] @ widen(weights[0])
            for dy, weight in zip(grad_wide[1:], weights[1:], strict=True):
                dx += dy @ widen(weight)
            dx = dx.to(x.dtype)
        full = widen(join_sequence(gather.wait()).flatten(0, 1)) if gather is not None else None
        if need[0]:
            scatter = start_reduce_scatter_sequence(dx, ctx.axis)
        found: list[torch.Tensor | None] = []
        for dy, need_weight, need_bias in zip(grad_wide, need_weights, need_biases, strict=True):
            rows = dy.flatten(0, 1)
            found.append((rows.T @ full).to(x.dtype) if need_weight and full is not None else None)
            found.append(rows.sum(0).to(x.dtype) if need_bias else None)
        return (scatter.wait() if scatter is not None else None, None, *found)


def column_parallel(axis: Axis, x: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """``x [B, S / n, A]`` -> ``[B, S, O_i / n]`` for each of ``layers``, which hold this rank's output features."""
    parameters: list[torch.Tensor | None] = []
    for layer in layers:
        parameters += [layer.weight, layer.bias]
    return _ColumnParallel.apply(x, axis, *parameters)


class RowParallelLinear(nn.Linear):
    """``[B, S, A / n] -> [B, S / n, O]``: this rank's input features, partial sums reduce-scattered, then the bias."""

    axis: Axis

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = reduce_scatter_sequence(linear(input, self.weight), self.axis)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Embedding):
    """Token ids ``[B, S]`` -> ``[B, S / n, D]``; holds the rows ``first .. first + count`` of the vocabulary."""

    axis: Axis
    first: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local = input - self.first
        held = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.masked_fill(~held, 0), self.weight)
        return reduce_scatter_sequence(rows * held.unsqueeze(-1), self.axis)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum over this rank's counted tokens of logsumexp(z) - z[label], z = x W^T with W's rows split over ranks.

    Every chunk of rows is gathered from all ranks, so each rank forms its columns of all their logits. The statistics
    of a row are summed over ranks: max, then sum of exponentials and the label's logit. dz = softmax(z) - onehot;
    dx = reduce-scatter(dz W), dW = dz^T x: formed while the chunk's logits exist. The value covers this rank's tokens
    only, so that values add up over ranks like every other sum; the gradient is that of the sum over all of them.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, first: int, axis: Axis, chunk_tokens: int
    ) -> torch.Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        n, held = axis.size, weight.shape[0]
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if need_weight else None
        step = max(1, chunk_tokens // n)
        operand = widen(weight)
        for start in range(0, x.shape[0], step):
            x_c = x[start : start + step]
            rows = x_c.shape[0]
            labels_c = labels[:, start : start + rows].flatten()
            full = x_c.new_empty(n * rows, x.shape[1])
            all_gather_single(full, x_c.contiguous(), group=axis.group)
            full = widen(full)
            logits = (full @ operand.T).to(x.dtype).to(wide)
            counted = labels_c != IGNORE
            local = labels_c - first
            mine = counted & (local >= 0) & (local < held)
            target = local.masked_fill(~mine, 0).unsqueeze(1)
            top = logits.amax(-1)
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
            exponentials = logits.sub(top.unsqueeze(1)).exp_()
            sums = torch.stack([exponentials.sum(-1), logits.gather(1, target).squeeze(1) * mine])
            dist.all_reduce(sums, group=axis.group)
            losses = (sums[0].log() + top - sums[1]) * counted
            total += losses.view(n, rows)[axis.index].sum()
            if not (need_x or need_weight):
                continue
            dz = exponentials.div_(sums[0].unsqueeze(1))
            dz.scatter_add_(1, target, -mine.to(wide).unsqueeze(1))
            dz = widen(dz.mul_(counted.unsqueeze(1)).to(x.dtype))
            if dx is not None:
                part = torch.empty_like(x_c)
                reduce_scatter_single(part, (dz @ operand).to(x.dtype), group=axis.group)
                dx[start : start + rows] = part
            if dweight is not None:
                dweight += dz.T @ full
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(
        ctx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        dx, dweight = ctx.saved_tensors
        scale = grad_outputs[0]
        dx = None if dx is None else dx * scale.to(dx.dtype)
        dweight = None if dweight is None else (dweight * scale).to(ctx.weight_dtype)
        return dx, dweight, None, None, None, None


def vocab_parallel_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int, *, first: int, axis: Axis
) -> torch.Tensor:
    """Summed cross-entropy, in nats, of this rank's part of the sequence; a scalar in float32 (float64 for float64).

    ``x [B, S / n, D]``, ``weight [V / n, D]`` (rows ``first`` and following), ``labels [B, S]`` with -100 where a token
    does not count. At most ``chunk_tokens`` rows of ``V / n`` logits exist on a rank at a time.
    """
    by_rank = labels.unflatten(1, (axis.size, -1)).transpose(0, 1).flatten(1, 2)
    return _VocabParallelCrossEntropy.apply(x.flatten(0, 1), weight, by_rank, first, axis, chunk_tokens)


def gather_prefix(counts: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum of ``counts`` over the ranks before this one on ``axis`` (zeros on the first). Not differentiable."""
    gathered = counts.new_empty(axis.size, *counts.shape)
    all_gather_single(gathered.flatten(0, 1), counts.contiguous(), group=axis.group)
    return gathered[: axis.index].sum(0)


def local_shape(shape: Sequence[int], splits: dict[int, Axis]) -> tuple[list[int], list[int]]:
    """(offsets, sizes) of this rank's part of a tensor of ``shape`` whose dims are split over axes."""
    offsets, sizes = [0] * len(shape), list(shape)
    for dim, axis in splits.items():
        offsets[dim], sizes[dim] = split_range(shape[dim], axis)
    return offsets, sizes
