"""Rotates pairs of features by given angles, forward and backward."""

import torch

from qwen_moe.models.ops.compiled import fused


@fused
def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)], -1)


class _Rope(torch.autograd.Function):
    """A rotation. Its backward is the transpose: the rotation by minus the angle."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # Contiguous, as x usually is: another stride order would be traced and compiled again.
        return _rotate(grad_outputs[0].contiguous(), cos, -sin), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate dims i and i + C/2 of ``x [..., C]`` by the angles of ``cos, sin [..., C/2]``, which broadcast over x."""
    return _Rope.apply(x, cos, sin)
