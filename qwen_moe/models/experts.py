"""Routed experts: stacked SwiGLU weights run over tokens that are already grouped by expert.

Shapes: N rows (token, expert) sorted by expert, D hidden, E experts, F expert hidden.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from qwen_moe.models.feed_forward import swiglu

GroupedMM = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def loop_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``x [N, A]`` times ``weight [E, O, A]`` transposed, rows split by ``counts [E]``: the plain loop, any dtype."""
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, weight[expert]) for expert, part in enumerate(parts)])


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The same as `loop_mm` in one kernel. `F.grouped_mm` has none for float64, for no rows at all, and for rows that are
    not a multiple of 16 bytes long: these take the loop."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype == torch.float64 or not aligned or not x.shape[0]:
        return loop_mm(x, weight, counts)
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))


class Experts(nn.Module):
    """``forward(x [N, D], counts [E]) -> [N, D]``; rows of expert e follow those of e - 1.

    ``gate_up_proj [E, 2, F, D]`` holds gate (index 0) and up (1), so that one grouped matmul does both and every split
    of F keeps them together; ``down_proj [E, D, F]``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        # What a plan replaces where another provider of kernels does the products.
        self.up_mm: GroupedMM = grouped_mm
        self.down_mm: GroupedMM = grouped_mm

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        g, u = self.up_mm(x, self.gate_up_proj.flatten(1, 2), counts).chunk(2, dim=-1)
        return self.down_mm(swiglu(g, u), self.down_proj, counts)
