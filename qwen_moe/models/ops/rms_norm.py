"""RMSNorm (arXiv 1910.07467), forward and backward. The mean square is computed in float32 (float64 for float64)."""

import torch

from parallel.gemm import wanted
from qwen_moe.models.ops.compiled import fused
from qwen_moe.models.ops.dtypes import accumulation_dtype


@fused
def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(accumulation_dtype(x.dtype))
    r = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
    # As in transformers' Qwen2RMSNorm: the normalized input is rounded to the input's dtype before the weight.
    return (wide * r).to(x.dtype).mul_(weight), r


@fused
def _backward(
    x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dy = dy.to(r.dtype)
    normed = x.to(r.dtype) * r
    dweight = (dy.flatten(0, -2) * normed.flatten(0, -2)).sum(0).to(weight.dtype)
    h = dy * weight.to(r.dtype)
    projection = torch.linalg.vecdot(h, normed).div_(x.shape[-1]).unsqueeze(-1)
    return h.sub_(normed.mul_(projection)).mul_(r).to(x.dtype), dweight


@fused
def _weight_gradient(x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    normed = x.to(r.dtype) * r
    return (dy.to(r.dtype).flatten(0, -2) * normed.flatten(0, -2)).sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = w * (x * r), r = rsqrt(mean(x^2) + eps). Saves x and r only.

    With n = x * r and h = w * dy: dx = r * (h - n * mean(h * n)), dw = sum over rows of dy * n.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, r = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        if not wanted(ctx)[0]:
            return None, _weight_gradient(x, weight, r, grad_outputs[0]), None
        dx, dweight = _backward(x, weight, r, grad_outputs[0])
        return dx, dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x [..., D]`` divided by the root of its mean square over the last dim, times ``weight [D]``, in x's dtype."""
    return _RMSNorm.apply(x, weight, eps)
