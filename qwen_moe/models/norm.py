"""RMSNorm (arXiv 1910.07467)."""

import torch
from torch import nn

from qwen_moe.models.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Normalizes the last dim. ``forward(x [..., D]) -> [..., D]`` in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
