"""torch's attention kernel, where it is the fastest."""

import torch
import torch.nn.functional as F

from parallel.gemm import widen


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """``q [B, S, H, C], k, v [B, T, G, C] -> [B, S, H, C]``; query head h uses key/value head h // (H / G). With ``causal``
    (S = T) a query sees keys up to itself, else all keys."""
    y = F.scaled_dot_product_attention(
        widen(q.transpose(1, 2)),
        widen(k.transpose(1, 2)),
        widen(v.transpose(1, 2)),
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.to(q.dtype).transpose(1, 2)
