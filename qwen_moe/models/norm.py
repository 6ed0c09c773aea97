"""RMSNorm (arXiv 1910.07467) with statistics in float32, or in float64 when the input is float64."""

import torch
from torch import nn


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, RoPE tables, router softmax and losses are computed for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    """y = w * (x * r), r = rsqrt(mean(x^2) + eps). Saves x and r only.

    With n = x * r and h = w * dy: dx = r * (h - n * mean(h * n)), dw = sum over rows of dy * n.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(statistics_dtype(x.dtype))
        r = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
        ctx.save_for_backward(x, weight, r)
        # As in transformers' Qwen2RMSNorm: the normalised input is rounded to the input's dtype before the weight.
        return (wide * r).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        dy = grad_outputs[0].to(r.dtype)
        normed = x.to(r.dtype).mul_(r) if x.dtype != r.dtype else x * r
        flat = normed.flatten(0, -2)
        dweight = (dy.flatten(0, -2) * flat).sum(0).to(weight.dtype)
        h = dy * weight.to(r.dtype)
        projection = torch.linalg.vecdot(h, normed).div_(x.shape[-1]).unsqueeze(-1)
        dx = h.sub_(normed.mul_(projection)).mul_(r).to(x.dtype)
        return dx, dweight, None


class RMSNorm(nn.Module):
    """Normalises the last dim. ``forward(x [..., D]) -> [..., D]`` in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)
