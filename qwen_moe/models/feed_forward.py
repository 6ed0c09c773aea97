"""SwiGLU feed-forward (arXiv 2002.05202), used in dense layers and as the shared expert."""

from collections.abc import Callable

import torch
from torch import nn

from qwen_moe.models.linear import Linear, Project, project
from qwen_moe.models.ops.swiglu import swiglu
from qwen_moe.models.ops.swiglu_linear import swiglu_linear


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``: ``[..., D] -> [..., D]``, times ``scale [..., 1]`` if there is one."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        # Sharding sets these for tensor parallelism or other kernels.
        self.project: Project = project
        # Where a device has a part of the inner features: of its products with them, the sum over devices.
        self.summed: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        g, u = self.project(x, self.gate_proj, self.up_proj)
        down = self.down_proj
        if self.summed is not None:
            y = self.summed(swiglu_linear(g, u, down.weight))
        elif type(down) is Linear:
            return swiglu_linear(g, u, down.weight, scale)  # scales its input, so that backward needs no output
        else:
            y = down(swiglu(g, u))  # a kernel provider's, which keeps what its backward needs
        return y if scale is None else scale * y
