"""SwiGLU feed-forward (arXiv 2002.05202), dense layers and the shared expert."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Project = Callable[..., tuple[torch.Tensor, ...]]


class _SwiGLU(torch.autograd.Function):
    """silu(g) * u. Saves g and u only.

    With s = sigmoid(g): d silu(g)/dg = s * (1 + g * (1 - s)), so dg = dy * u * that and du = dy * silu(g).
    """

    @staticmethod
    def forward(ctx, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, u = ctx.saved_tensors
        dy = grad_outputs[0]
        du = F.silu(g).mul_(dy)
        dg = torch.ops.aten.silu_backward(dy * u, g)
        return dg, du


def swiglu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``silu(g) * u`` elementwise, for gate and up projections of one shape."""
    return _SwiGLU.apply(g, u)


def project(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """Each of ``linears`` applied to ``x``. A plan replaces it where one gather of a split sequence serves them all."""
    return tuple(linear(x) for linear in linears)


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
