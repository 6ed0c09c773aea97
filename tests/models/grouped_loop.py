"""The definition of a grouped product, which the fast ones are compared with: a loop, differentiated by torch."""

import torch
import torch.nn.functional as F


def loop_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows of each expert, ``x [N, A]`` split by ``counts [E]``, times its ``weight [E, O, A]`` transposed: ``[N, O]``."""
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, weight[expert]) for expert, part in enumerate(parts)])
