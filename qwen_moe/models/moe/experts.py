"""Routed experts: stacked SwiGLU weights run over tokens that are already grouped by expert.

Shapes: N rows (token, expert) sorted by expert, D hidden, E experts, F expert hidden.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qwen_moe.models.moe.dispatch import Route
from qwen_moe.models.ops.grouped_matmul import GroupedMM, grouped_mm
from qwen_moe.models.ops.swiglu import joined_swiglu


class Experts(nn.Module):
    """``compute(x [N, D], counts [E]) -> [N, D]``; rows of expert e follow those of e - 1. `forward` is for rows that may
    travel.

    ``gate_up_proj [E, 2, F, D]`` holds gate (index 0) and up (1), so that one grouped GEMM computes both and every split of
    F keeps them together. ``down_proj`` is ``[E, D, F]``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        # Sharding replaces these when a kernel provider has its own grouped GEMM.
        self.up_mm: GroupedMM = grouped_mm
        self.down_mm: GroupedMM = grouped_mm

    def forward(self, rows: Sequence[torch.Tensor], routes: Sequence[Route]) -> tuple[torch.Tensor, ...]:
        """Receive, compute and send back the rows of each part of a micro-batch, which were sent on ``routes``. One call for
        all parts: FSDP then gathers weights and reduces gradients once."""
        return tuple(
            route.send_back(self.compute(*route.receive(one))) for one, route in zip(rows, routes, strict=True)
        )

    def compute(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        hidden = joined_swiglu(self.up_mm(x, self.gate_up_proj.flatten(1, 2), counts))
        return self.down_mm(hidden, self.down_proj, counts)
