"""SwiGLU feed-forward (arXiv 2002.05202), used in dense layers and as the shared expert."""

import torch
from torch import nn

from qwen_moe.models.linear import Linear, Project, project
from qwen_moe.models.ops.swiglu import swiglu


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
