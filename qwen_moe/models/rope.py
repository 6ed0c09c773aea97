"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face's Qwen.

Shapes: B batch, S sequence, H heads, C head dim.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qwen_moe.config import ModelConfig, RopeScaling
from qwen_moe.models.ops.rotate import rotate


class RotaryTables(NamedTuple):
    """``cos, sin [B or 1, S, C/2]`` of the rotation angles, and the factor of the scores before the softmax (C^-1/2; some
    methods of context extension change it)."""

    cos: torch.Tensor
    sin: torch.Tensor
    softmax_scale: float


@dataclass(frozen=True)
class Rope:
    """Angles ``position * theta^(-2 i / C)``. ``scaling`` of frequencies and scores as transformers defines it; see
    `config.rope.RopeScaling`. ``trained``: the length that the model was trained on; ``factor``: how much longer it reads.
    """

    head_dim: int
    theta: float
    scaling: RopeScaling | None = None
    trained: int = 0
    factor: float = 1.0

    def tables(self, position_ids: torch.Tensor, dtype: torch.dtype) -> RotaryTables:
        """The tables for ``position_ids [B or 1, S]``, computed in float64 and rounded to ``dtype`` at the end. In float32
        an angle near position 1,000,000 would be off by up to 0.06."""
        longest = 0
        if self.scaling is not None and self.scaling.type == "dynamic":
            longest = int(position_ids.max()) + 1
        angles = position_ids[..., None] * self.frequencies(longest).to(position_ids.device, non_blocking=True)
        scale = self.score_factor / math.sqrt(self.head_dim)
        return RotaryTables(angles.cos().to(dtype), angles.sin().to(dtype), scale)

    def frequencies(self, longest: int = 0) -> torch.Tensor:
        """Radians per position of each pair, ``[C / 2]`` float64, for a text of ``longest`` tokens."""
        theta, kind = self.theta, self.scaling.type if self.scaling is not None else None
        if kind == "dynamic":
            stretch = self.factor * max(longest, self.trained) / self.trained - (self.factor - 1)
            theta *= stretch ** (self.head_dim / (self.head_dim - 2))
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        plain = theta**-exponent
        if kind == "linear":
            return plain / self.factor
        if kind == "yarn":
            share = self._divided_share()
            return plain * (1 - share) + plain / self.factor * share
        return plain

    def _divided_share(self) -> torch.Tensor:
        """How much of each frequency YaRN divides: 0 for fast pairs, 1 for slow ones."""
        scaling = self.scaling
        assert scaling is not None

        def pair(turns: float) -> float:
            """The pair that turns this often in the trained length."""
            return self.head_dim * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        return ((torch.arange(self.head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)

    @property
    def score_factor(self) -> float:
        """By how much YaRN multiplies the scores: transformers multiplies q and k by its root."""
        scaling = self.scaling
        if scaling is None or scaling.type != "yarn":
            return 1.0

        def temperature(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0

        if scaling.attention_factor is not None:
            factor = scaling.attention_factor
        elif scaling.mscale and scaling.mscale_all_dim:
            factor = temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
        else:
            factor = temperature(1)
        return factor**2


def make_rope(config: ModelConfig) -> Rope:
    """The kind of rotation that ``config`` asks for."""
    trained = config.trained_length
    return Rope(config.head_dim, config.rope_theta, config.rope_scaling, trained, config.rope_factor)


def apply_rope(x: torch.Tensor, rotary: RotaryTables) -> torch.Tensor:
    """Rotate ``x [B, S, H, C]`` by the tables of its positions; dims i and i + C/2 form a pair."""
    return rotate(x, rotary.cos.unsqueeze(2), rotary.sin.unsqueeze(2))
