"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face's Qwen."""

import torch

from qwen_moe.models.fused import fused
from qwen_moe.models.norm import statistics_dtype


def rope_tables(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotation angles for ``position_ids [B or 1, S]``, each ``[B or 1, S, C/2]`` in ``dtype``.

    Angles are computed in float32 (float64 when ``dtype`` is float64) and rounded at the end.
    """
    wide = statistics_dtype(dtype)
    exponent = torch.arange(0, head_dim, 2, dtype=wide, device=position_ids.device) / head_dim
    angles = position_ids[..., None].to(wide) * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


@fused
def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)], -1)


class _Rope(torch.autograd.Function):
    """A rotation: its transpose is the rotation by minus the angle."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, -sin), None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x [B, S, H, C]`` by tables ``[B or 1, S, C/2]``; dims i and i + C/2 form a pair."""
    return _Rope.apply(x, cos.unsqueeze(2), sin.unsqueeze(2))
