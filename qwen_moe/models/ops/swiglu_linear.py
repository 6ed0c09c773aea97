"""A linear layer of SwiGLU, whose backward computes SwiGLU's values again instead of keeping them.

Shapes: A/O input/output features; leading dims are flattened.
"""

import torch

from parallel.gemm import affine, linear, widen
from qwen_moe.models.ops.swiglu import (
    gradients_and_values,
    swiglu,
    values,
    weighted_gradients_apart,
    weighted_values,
)


class _SwiGLULinear(torch.autograd.Function):
    """y = (scale * silu(g) * u) W^T of rows. Keeps g, u and scale."""

    @staticmethod
    def forward(
        ctx, g: torch.Tensor, u: torch.Tensor, scale: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(g, u, scale, weight)
        return affine(values(g, u) if scale is None else weighted_values(g, u, scale), weight)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, u, scale, weight = ctx.saved_tensors
        dy, dscale, dweight = widen(grad_outputs[0]), None, None
        dhidden = (dy @ widen(weight)).to(g.dtype)
        if scale is None:
            dg, du, hidden = gradients_and_values(g, u, dhidden)
        else:
            dg, du, dscale, hidden = weighted_gradients_apart(g, u, scale, dhidden)
        if ctx.needs_input_grad[3]:
            dweight = (dy.T @ widen(hidden)).to(weight.dtype)
        return dg, du, dscale, dweight


def swiglu_linear(
    g: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """``scale * silu(g) * u`` times ``weight [O, A]`` transposed: ``g, u [..., A]``, ``scale [..., 1]`` -> ``[..., O]``."""
    if not torch.is_grad_enabled():
        hidden = swiglu(g, u)
        return linear(hidden if scale is None else hidden * scale, weight)
    rows = g.flatten(0, -2), u.flatten(0, -2)
    return _SwiGLULinear.apply(*rows, None if scale is None else scale.flatten(), weight).unflatten(0, g.shape[:-1])
