"""RMSNorm (arXiv 1910.07467) with statistics in float32, or in float64 when the input is float64."""

import torch
from torch import nn

from qwen_moe.models.fused import fused


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, RoPE tables, router softmax and losses are computed for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@fused
def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(statistics_dtype(x.dtype))
    r = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
    # As in transformers' Qwen2RMSNorm: the normalised input is rounded to the input's dtype before the weight.
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
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        dx, dweight = _backward(x, weight, r, grad_outputs[0])
        return dx, dweight, None


class RMSNorm(nn.Module):
    """Normalises the last dim. ``forward(x [..., D]) -> [..., D]`` in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)
