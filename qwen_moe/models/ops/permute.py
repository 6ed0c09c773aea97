"""Sorts token rows by expert, and combines them by token again: the two ends of every dispatch.

Shapes: T tokens, D hidden, E experts, K top-k, N = T * K rows sorted by expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qwen_moe.models.ops.compiled import fused


class Permutation(NamedTuple):
    """Rows sorted by expert: ``token [N]`` of each row, ``row [T, K]`` of each (token, choice), ``counts [E]``."""

    token: torch.Tensor
    row: torch.Tensor
    counts: torch.Tensor


def sort_by_expert(indices: torch.Tensor, num_experts: int) -> Permutation:
    """The stable order that puts all choices ``indices [T, K]`` of expert 0 first, then 1, and so on."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), device=order.device)
    # Not bincount, which synchronizes with a GPU to learn the size of its result.
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    return Permutation(
        token=order.div(indices.shape[1], rounding_mode="floor"),
        row=row.view_as(indices),
        counts=counts.scatter_add_(0, flat, torch.ones_like(flat)),
    )


class _Permute(torch.autograd.Function):
    """x [T, D] -> rows [N, D]. backward sums each token's K rows by a gather (no scatter-add, hence deterministic)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return F.embedding_bag(row, grad_outputs[0], mode="sum"), None, None


@fused
def _combine_gradients(
    dy: torch.Tensor, rows: torch.Tensor, row_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rows ``[N, D]`` and of their weights ``[N]``, from the output's gradient at each row's token."""
    return dy * row_weights.unsqueeze(1), torch.linalg.vecdot(dy, rows)


class _Combine(torch.autograd.Function):
    """rows [N, D], weights [T, K] -> sum over K of weight * row, [T, D]. backward scales the gathered output gradient."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weights: torch.Tensor, token: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, token, row)
        return F.embedding_bag(row, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, weights, token, row = ctx.saved_tensors
        dy = grad_outputs[0].index_select(0, token)
        row_weights = torch.empty_like(weights.flatten())
        row_weights[row.flatten()] = weights.flatten()
        drows, dot = _combine_gradients(dy, rows, row_weights)
        return drows, dot[row], None, None


def permute(x: torch.Tensor, order: Permutation) -> torch.Tensor:
    """Token rows ``[T, D]`` -> one row per choice, sorted by expert ``[N, D]``."""
    return _Permute.apply(x, order.token, order.row)


def combine(rows: torch.Tensor, weights: torch.Tensor, order: Permutation) -> torch.Tensor:
    """Rows sorted by expert ``[N, D]`` -> their weighted sums by token ``[T, D]``."""
    return _Combine.apply(rows, weights, order.token, order.row)
