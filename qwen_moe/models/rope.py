"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face's Qwen.

Shapes: B batch, S sequence, H heads, C head dim.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qwen_moe.config import ModelConfig
from qwen_moe.models.ops.rotate import rotate


class RotaryTables(NamedTuple):
    """``cos, sin [B or 1, S, C/2]`` of the rotation angles, and the factor of the scores before the softmax (C^-1/2; some
    methods of context extension change it)."""

    cos: torch.Tensor
    sin: torch.Tensor
    softmax_scale: float


@dataclass(frozen=True)
class Rope:
    """Angles ``position * theta^(-2 i / C)``. Another kind of RoPE scaling is another class with the same `tables`."""

    head_dim: int
    theta: float

    def tables(self, position_ids: torch.Tensor, dtype: torch.dtype) -> RotaryTables:
        """The tables for ``position_ids [B or 1, S]``, computed in float64 and rounded to ``dtype`` at the end. In float32
        an angle near position 1,000,000 would be off by up to 0.06."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=position_ids.device) / self.head_dim
        angles = position_ids[..., None] * self.theta**-exponent
        return RotaryTables(angles.cos().to(dtype), angles.sin().to(dtype), 1 / math.sqrt(self.head_dim))


def make_rope(config: ModelConfig) -> Rope:
    """The kind of rotation that ``config`` asks for."""
    return Rope(config.head_dim, config.rope_theta)


def apply_rope(x: torch.Tensor, rotary: RotaryTables) -> torch.Tensor:
    """Rotate ``x [B, S, H, C]`` by the tables of its positions; dims i and i + C/2 form a pair."""
    return rotate(x, rotary.cos.unsqueeze(2), rotary.sin.unsqueeze(2))
