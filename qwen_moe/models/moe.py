"""The MoE block: router, dispatch of tokens to experts and back, gated shared expert.

Shapes: B batch, S sequence, T = B * S tokens, D hidden, E experts, K top-k, N = T * K rows sorted by expert.
"""

from typing import NamedTuple

import torch
from torch import nn

from qwen_moe.config import ModelConfig
from qwen_moe.models.experts import Experts
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.router import Router, RouterStatistics


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
    return Permutation(
        token=order.div(indices.shape[1], rounding_mode="floor"),
        row=row.view_as(indices),
        counts=torch.bincount(flat, minlength=num_experts),
    )


class _Dispatch(torch.autograd.Function):
    """x [T, D] -> rows [N, D]; backward sums each token's K rows by gathering them (no scatter, so deterministic)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row,) = ctx.saved_tensors
        gathered = grad_outputs[0].index_select(0, row.flatten()).view(*row.shape, -1)
        return gathered.sum(1), None, None


class _Combine(torch.autograd.Function):
    """rows [N, D], weights [T, K] -> sum over K of weight * row, [T, D]; backward scales the gathered output gradient."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weights: torch.Tensor, token: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, token, row)
        gathered = rows.index_select(0, row.flatten()).view(*row.shape, -1)
        return torch.bmm(weights.unsqueeze(1), gathered).squeeze(1)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, weights, token, row = ctx.saved_tensors
        dy = grad_outputs[0].index_select(0, token)
        dot = torch.linalg.vecdot(dy, rows)
        row_weights = torch.empty_like(dot)
        row_weights[row.flatten()] = weights.flatten()
        return dy.mul_(row_weights.unsqueeze(1)), dot[row], None, None


class MoE(nn.Module):
    """``forward(x [B, S, D]) -> (y [B, S, D], RouterStatistics)``: routed experts plus the sigmoid-gated shared one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.num_experts = config.num_experts
        self.has_shared_expert = config.shared_expert_intermediate_size > 0
        if self.has_shared_expert:
            self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, RouterStatistics]:
        weights, indices, statistics = self.gate(x)
        order = sort_by_expert(indices, self.num_experts)
        rows = _Dispatch.apply(x.flatten(0, -2), order.token, order.row)
        rows = self.experts(rows, order.counts)
        y = _Combine.apply(rows, weights, order.token, order.row).view_as(x)
        if self.has_shared_expert:
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y, statistics
