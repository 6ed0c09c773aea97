"""SwiGLU feed-forward (arXiv 2002.05202), dense layers and the shared expert."""

import torch
import torch.nn.functional as F
from torch import nn

from qwen_moe.models.fused import fused
from qwen_moe.models.linear import Linear, Project, project


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


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``: ``[..., D] -> [..., D]``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.project: Project = project

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, u = self.project(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(g, u))
