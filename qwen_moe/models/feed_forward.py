"""SwiGLU feed-forward (arXiv 2002.05202), dense layers and the shared expert."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from qwen_moe.models.fused import fused

Project = Callable[..., tuple[torch.Tensor, ...]]


@fused
def _forward(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return F.silu(g).mul_(u)


def _gradients(g: torch.Tensor, u: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(dy * u, g), F.silu(g).mul_(dy)


_backward = fused(_gradients)


@fused
def _backward_joined(g: torch.Tensor, u: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.cat(_gradients(g, u, dy), -1)


class _SwiGLU(torch.autograd.Function):
    """silu(g) * u. Saves g and u only.

    With s = sigmoid(g): d silu(g)/dg = s * (1 + g * (1 - s)), so dg = dy * u * that and du = dy * silu(g).
    """

    @staticmethod
    def forward(ctx, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(g, u)
        return _forward(g, u)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, u = ctx.saved_tensors
        return _backward(g, u, grad_outputs[0])


class _JoinedSwiGLU(torch.autograd.Function):
    """The same of gate and up side by side, whose gradient is written in one piece."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        g, u = gate_up.chunk(2, dim=-1)
        return _backward_joined(g, u, grad_outputs[0])


def swiglu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``silu(g) * u`` elementwise, for gate and up projections of one shape."""
    return _SwiGLU.apply(g, u)


def joined_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``[..., 2 F] -> [..., F]``: `swiglu` of the first half (gate) and the second (up) of the last dim."""
    return _JoinedSwiGLU.apply(gate_up)


class _Project(torch.autograd.Function):
    """y_i = x W_i^T + b_i. backward: dx = sum_i dy_i W_i, added up inside the products; dW_i = dy_i^T x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True) if w is not None)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = [dy.flatten(0, -2) for dy in grad_outputs]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows[0] @ weights[0]
            for dy, weight in zip(rows[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            dx = dx.view_as(x)
        found: list[torch.Tensor | None] = []
        for dy, need_weight, need_bias in zip(
            rows, ctx.needs_input_grad[1::2], ctx.needs_input_grad[2::2], strict=True
        ):
            found.append(dy.T @ x.flatten(0, -2) if need_weight else None)
            found.append(dy.sum(0) if need_bias else None)
        return dx, *found


def project(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """Each of ``linears`` applied to ``x``. A plan replaces it where one gather of a split sequence serves them all."""
    parameters: list[torch.Tensor | None] = []
    for linear in linears:
        parameters += [linear.weight, linear.bias]
    return _Project.apply(x, *parameters)


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``: ``[..., D] -> [..., D]``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.project: Project = project

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, u = self.project(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(g, u))
