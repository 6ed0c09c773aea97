"""The MoE block: router, dispatch of tokens to experts and back, gated shared expert.

Shapes: B batch, S sequence, T = B * S tokens, D hidden, E experts, K top-k, N = T * K rows sorted by expert.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qwen_moe.config import ModelConfig
from qwen_moe.models.experts import Experts
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.fused import fused
from qwen_moe.models.linear import Linear
from qwen_moe.models.router import Router, RouterStatistics

Dispatcher = Callable[..., tuple[torch.Tensor, Any]]


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
    # Not bincount, which on a GPU waits to learn the size of its result.
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    return Permutation(
        token=order.div(indices.shape[1], rounding_mode="floor"),
        row=row.view_as(indices),
        counts=counts.scatter_add_(0, flat, torch.ones_like(flat)),
    )


class _Permute(torch.autograd.Function):
    """x [T, D] -> rows [N, D]; backward sums each token's K rows where they lie (no scatter, so deterministic)."""

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
    """rows [N, D], weights [T, K] -> sum over K of weight * row, [T, D]; backward scales the gathered output gradient."""

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


class LocalDispatcher:
    """All experts are here: sort the rows, run the experts, put the results back. The oracle of every other dispatcher.

    A dispatcher is called as ``dispatcher(x [T, D], weights [T, K], indices [T, K], experts, meanwhile)`` and returns the
    routed output ``[T, D]`` and the value of ``meanwhile()``, work of its own that it may do while tokens travel.
    An index equal to the number of experts marks a choice that is dropped; its weight is 0.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        experts: Experts,
        meanwhile: Callable[[], torch.Tensor | None],
        drops: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        order = sort_by_expert(indices, self.num_experts + drops)
        rows = permute(x, order)
        if drops:  # dropped choices are sorted to the end and stay zero
            kept = rows.shape[0] - int(order.counts[-1])
            outputs = experts(rows[:kept], order.counts[:-1])
            outputs = F.pad(outputs, (0, 0, 0, rows.shape[0] - kept))
        else:
            outputs = experts(rows, order.counts)
        return combine(outputs, weights, order), meanwhile()


def within_capacity(
    indices: torch.Tensor, num_experts: int, capacity: int, earlier: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Which choices ``indices [B, S, K]`` are among the first ``capacity`` of their expert in their sequence: ``[B, S, K]``.

    First come, first served in order of position, so that no token's fate depends on later ones. ``earlier`` maps this
    rank's counts ``[B, E]`` to those of the ranks that hold earlier parts of the sequence.
    """
    batch, _, top_k = indices.shape
    flat = indices.flatten(1)
    chosen = F.one_hot(flat, num_experts)  # [B, S * K, E]
    before = chosen.cumsum(1) - chosen + earlier(chosen.sum(1)).unsqueeze(1)
    return (before.gather(2, flat.unsqueeze(2)).squeeze(2) < capacity).view(batch, -1, top_k)


class MoE(nn.Module):
    """``forward(x [B, S, D]) -> (y [B, S, D], RouterStatistics)``: routed experts plus the sigmoid-gated shared one.

    ``capacity_factor`` > 0 lets an expert serve at most ``ceil(capacity_factor * S * K / E)`` choices of a sequence in
    training; the rest are dropped and counted. The unit is the sequence so that no layout changes what is dropped.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.capacity_factor = 0.0
        self.has_shared_expert = config.shared_expert_intermediate_size > 0
        if self.has_shared_expert:
            self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)
        # What a plan replaces when tokens, experts or the sequence are split over ranks.
        self.dispatcher: Dispatcher = LocalDispatcher(config.num_experts)
        self.sequence_parts = 1
        self.earlier_counts: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like

    def _shared(self, x: torch.Tensor) -> torch.Tensor | None:
        if not self.has_shared_expert:
            return None
        return self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, RouterStatistics]:
        weights, indices, statistics = self.gate(x)
        drops = self.capacity_factor > 0 and self.training
        if drops:
            sequence = x.shape[1] * self.sequence_parts
            capacity = math.ceil(self.capacity_factor * sequence * self.top_k / self.num_experts)
            per_sequence = indices.view(*x.shape[:2], -1)
            kept = within_capacity(per_sequence, self.num_experts, capacity, self.earlier_counts)
            statistics = statistics._replace(dropped=(~kept).flatten(1).sum(1))
            kept = kept.view_as(indices)
            weights, indices = weights * kept, indices.masked_fill(~kept, self.num_experts)
        routed, shared = self.dispatcher(
            x.flatten(0, -2), weights, indices, self.experts, lambda: self._shared(x), drops
        )
        y = routed.view_as(x)
        return (y if shared is None else y + shared), statistics
