"""A linear layer of SwiGLU, whose backward computes SwiGLU's values again instead of keeping them.

Shapes: A/O input/output features.
"""

import torch

from parallel.gemm import affine, linear, wanted, widen
from qwen_moe.models.ops.swiglu import (
    gradients_and_values,
    swiglu,
    values,
    weighted_gradients_apart,
    weighted_values,
)


class _SwiGLULinear(torch.autograd.Function):
    """y = (scale * silu(g) * u) W^T. Keeps g, u and scale. y is no view, of which FSDP would warn."""

    @staticmethod
    def forward(
        ctx, g: torch.Tensor, u: torch.Tensor, scale: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(g, u, scale, weight)
        rows = g.flatten(0, -2), u.flatten(0, -2)
        hidden = values(*rows) if scale is None else weighted_values(*rows, scale.flatten())
        return affine(hidden.view_as(g), weight)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, u, scale, weight = ctx.saved_tensors
        need, dy = wanted(ctx), widen(grad_outputs[0].flatten(0, -2))
        dg = du = dscale = dweight = None
        rows = g.flatten(0, -2), u.flatten(0, -2)
        if not any(need[:3]):
            hidden = values(*rows) if scale is None else weighted_values(*rows, scale.flatten())
        else:
            dhidden = (dy @ widen(weight)).to(g.dtype)
            if scale is None:
                dg, du, hidden = gradients_and_values(*rows, dhidden)
            else:
                dg, du, dscale, hidden = weighted_gradients_apart(*rows, scale.flatten(), dhidden)
                dscale = dscale.view_as(scale)
            dg, du = dg.view_as(g), du.view_as(u)
        if need[3]:
            dweight = (dy.T @ widen(hidden)).to(weight.dtype)
        return dg, du, dscale, dweight


def swiglu_linear(
    g: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """``scale * silu(g) * u`` times ``weight [O, A]`` transposed: ``g, u [..., A]``, ``scale [..., 1]`` -> ``[..., O]``."""
    if not torch.is_grad_enabled():
        hidden = swiglu(g, u)
        return linear(hidden if scale is None else hidden * scale, weight)
    return _SwiGLULinear.apply(g, u, scale, weight)
