"""Sorts token rows by expert, and sums them by token again: the two ends of every dispatch.

Shapes: T tokens, D hidden, E experts, K top-k, N = T * K rows sorted by expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException


class Rows(NamedTuple):
    """Rows sorted by expert: ``token [N]`` of each row, ``row [T, K]`` of each (token, choice), ``counts [E]``. Where rows
    at the end are left out, ``row`` still has them."""

    token: torch.Tensor
    row: torch.Tensor
    counts: torch.Tensor


def sort_by_expert(indices: torch.Tensor, num_experts: int) -> tuple[Rows, torch.Tensor]:
    """The stable order that puts all choices ``indices [T, K]`` of expert 0 first, then 1, and so on; and the choice ``[N]``
    (token * K + k) of each row."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), device=order.device)
    # Not bincount, which synchronizes with a GPU to learn the size of its result.
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    rows = Rows(
        token=order.div(indices.shape[1], rounding_mode="floor"),
        row=row.view_as(indices),
        counts=counts.scatter_add_(0, flat, torch.ones_like(flat)),
    )
    return rows, order


def number_dropped(counts: torch.Tensor) -> int:
    """The last of ``counts``, those of dropped choices: the host waits for a GPU to have it."""
    try:
        return int(counts[-1])
    except DataDependentOutputException:  # a shape-only run has no values: assume that none is dropped
        return 0


def sum_of_rows(rows: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """``rows [N, D]`` -> the sums ``[T, D]`` of those at ``row [T, K]``, by a gather (no scatter-add, hence deterministic).
    Rows that are left out at the end are zero."""
    if lost := row.numel() - rows.shape[0]:
        rows = F.pad(rows, (0, 0, 0, lost))
    return rows.index_select(0, row.flatten()) if row.shape[1] == 1 else F.embedding_bag(row, rows, mode="sum")


class _Permute(torch.autograd.Function):
    """x [T, D] -> rows [N, D]. backward sums each token's rows."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return sum_of_rows(grad_outputs[0], row), None, None


class _Combine(torch.autograd.Function):
    """rows [N, D] -> sums [T, D] of each token's rows. backward gathers the gradient."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, token: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token)
        return sum_of_rows(rows, row)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, token), None, None


def permute(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Token states ``[T, D]`` -> one row per choice, sorted by expert ``[N, D]``."""
    return _Permute.apply(x, rows.token, rows.row)


def permute_weights(weights: torch.Tensor, choice: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The weight of each row ``[N]``, of the choices' ``weights [T, K]``, by the ``choice [N]`` of each row and the rows
    ``row [T, K * copies]`` of each token, copies of a choice next to each other."""
    return _Permute.apply(weights.reshape(-1, 1), choice, row.reshape(weights.numel(), -1)).squeeze(1)


def combine(rows: torch.Tensor, order: Rows) -> torch.Tensor:
    """Rows sorted by expert ``[N, D]`` -> their sums by token ``[T, D]``."""
    return _Combine.apply(rows, order.token, order.row)
