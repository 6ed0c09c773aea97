"""Routed experts: stacked SwiGLU weights run over tokens that are already grouped by expert.

Shapes: N rows (token, expert) sorted by expert, D hidden, E experts, F expert hidden.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qwen_moe.models.moe.dispatch import Arrived, Route
from qwen_moe.models.ops.expert_products import down_product, up_product
from qwen_moe.models.ops.grouped_matmul import GroupedMM, Kernel
from qwen_moe.models.ops.permute import permute
from qwen_moe.models.ops.swiglu import weighted_swiglu


class Experts(nn.Module):
    """``compute``: the states of N rows -> ``[N, D]``; rows of expert e follow those of e - 1. `forward` is for rows that
    may travel.

    A row's weight multiplies the input of the down projection, not its output: the products are the same, and backward needs
    no output of any expert.

    ``gate_up_proj [E, 2, F, D]`` holds gate (index 0) and up (1), so that one grouped GEMM computes both and every split of
    F keeps them together. ``down_proj`` is ``[E, D, F]``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        # Sharding sets these when a kernel provider has its own grouped GEMM.
        self.up_mm: GroupedMM | None = None
        self.down_mm: GroupedMM | None = None
        self.kernel: Kernel | None = None  # default: the fastest

    def forward(self, rows: Sequence[torch.Tensor], routes: Sequence[Route]) -> tuple[torch.Tensor, ...]:
        """Receive, compute and send back the rows of each part of a micro-batch, which were sent on ``routes``. One call for
        all parts: FSDP then gathers weights and reduces gradients once."""
        return tuple(route.send_back(self.compute(route.receive(one))) for one, route in zip(rows, routes, strict=True))

    def compute(self, arrived: Arrived) -> torch.Tensor:
        states, rows, weights = arrived
        up, down = self.gate_up_proj.flatten(1, 2), self.down_proj
        if self.up_mm is None or self.down_mm is None:
            gate_up = up_product(states, rows, up, self.kernel)
            return down_product(gate_up, weights, down, rows.counts, self.kernel)
        gate_up = self.up_mm(permute(states, rows), up, rows.counts)
        return self.down_mm(weighted_swiglu(gate_up, weights), down, rows.counts)
