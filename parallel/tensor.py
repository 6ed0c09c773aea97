"""Tensor-parallel layers with sequence parallelism (arXiv 1909.08053, 2205.05198).

Between layers every rank holds its part ``[B, S / n, D]`` of the sequence. A block gathers the sequence, applies its own
columns of the first weights, and reduce-scatters the partial sums from its own rows of the last weight.
Shapes: T tokens, V vocabulary, A/O input/output features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import (
    join_sequence,
    reduce_scatter_sequence,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from parallel.gemm import affine, linear, summed_products, wanted, widen
from parallel.mesh import Axis


def split_range(size: int, axis: Axis) -> tuple[int, int]:
    """(first, count) of this rank's part when ``size`` items are split in order; the first ranks take one more if uneven."""
    each, more = divmod(size, axis.size)
    first = axis.index * each + min(axis.index, more)
    return first, each + (axis.index < more)


class _ColumnParallel(torch.autograd.Function):
    """y_i = gather(x) W_i^T + b_i for several W_i, with a single gather.

    backward: dx = reduce-scatter(sum_i dy_i W_i), dW_i = dy_i^T gather(x). Only this rank's part of x is saved. The second
    gather overlaps with computing dx, and the reduce-scatter of dx overlaps with computing the dW_i.
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
        need = wanted(ctx)
        need_weights, need_biases = need[2::2], need[3::2]
        gather = start_gather_sequence(x, ctx.axis) if any(need_weights) else None
        scatter = None
        grad_rows = [widen(dy.flatten(0, 1)) for dy in grad_outputs]
        if need[0]:
            dx = summed_products(grad_rows, weights).to(x.dtype).unflatten(0, grad_outputs[0].shape[:2])
        full = widen(join_sequence(gather.wait()).flatten(0, 1)) if gather is not None else None
        if need[0]:
            scatter = start_reduce_scatter_sequence(dx, ctx.axis)
        parameter_gradients: list[torch.Tensor | None] = []
        for rows, need_weight, need_bias in zip(grad_rows, need_weights, need_biases, strict=True):
            parameter_gradients.append((rows.T @ full).to(x.dtype) if need_weight and full is not None else None)
            parameter_gradients.append(rows.sum(0).to(x.dtype) if need_bias else None)
        return (scatter.wait() if scatter is not None else None, None, *parameter_gradients)


def column_parallel(axis: Axis, x: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """``x [B, S / n, A]`` -> ``[B, S, O_i / n]`` for each of ``layers``, which hold this rank's output features."""
    parameters: list[torch.Tensor | None] = []
    for layer in layers:
        parameters += [layer.weight, layer.bias]
    return _ColumnParallel.apply(x, axis, *parameters)


class RowParallelLinear(nn.Linear):
    """``[B, S, A / n] -> [B, S / n, O]``: multiplies this rank's input features, reduce-scatters the partial sums, and then
    adds the bias."""

    axis: Axis

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.summed(linear(input, self.weight))

    def summed(self, partial: torch.Tensor) -> torch.Tensor:
        """The output of this rank's part of the sequence, from the products ``[B, S, O]`` of this rank's weight."""
        y = reduce_scatter_sequence(partial, self.axis)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Embedding):
    """Token ids ``[B, S]`` -> ``[B, S / n, D]``; holds the vocabulary rows from ``first`` on."""

    axis: Axis
    first: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local = input - self.first
        held = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.masked_fill(~held, 0), self.weight)
        return reduce_scatter_sequence(rows * held.unsqueeze(-1), self.axis)


def local_shape(shape: Sequence[int], splits: dict[int, Axis]) -> tuple[list[int], list[int]]:
    """(offsets, sizes) of this rank's part of a tensor of ``shape``. ``splits`` maps a dim to the axis that splits it."""
    offsets, sizes = [0] * len(shape), list(shape)
    for dim, axis in splits.items():
        offsets[dim], sizes[dim] = split_range(shape[dim], axis)
    return offsets, sizes
