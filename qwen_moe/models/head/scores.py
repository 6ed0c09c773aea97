"""The head of a reward model: scores of every token by criterion. Shapes: D hidden, C criteria, ``...`` tokens."""

import torch

from parallel.gemm import wanted
from qwen_moe.models.ops.dtypes import accumulation_dtype


class _LinearScores(torch.autograd.Function):
    """s = x W^T in float32, of states in any dtype: differences of scores would be lost in bf16's 8 bits.

    dx = ds W, dW = ds^T x. Only x and W are kept, in their own dtypes.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = accumulation_dtype(x.dtype)
        ctx.save_for_backward(x, weight)
        return x.to(wide) @ weight.to(wide).T

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        upstream, need = grad_outputs[0], wanted(ctx)
        dx = (upstream @ weight.to(upstream.dtype)).to(x.dtype) if need[0] else None
        if not need[1]:
            return dx, None
        rows = x.reshape(-1, x.shape[-1]).to(upstream.dtype)
        return dx, (upstream.reshape(-1, upstream.shape[-1]).T @ rows).to(weight.dtype)


def linear_scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Scores ``[..., C]`` of ``x [..., D]`` by ``weight [C, D]``, float32 (float64 for float64)."""
    return _LinearScores.apply(x, weight)
