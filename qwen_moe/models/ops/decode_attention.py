"""Attention of a few new tokens to many cached keys.

Query heads that share a key/value head, and sequences that share a prompt, become queries of one product, so that each
cached key is read once. Shapes: P prompts, S queries that see the same keys, T keys, H query heads, G key/value heads,
R = H / G, C head dim.
"""

from typing import Any

import torch

from qwen_moe.models.ops.dtypes import accumulation_dtype

_aten: Any = torch.ops.aten


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q [P, S, H, C]`` to all of ``k, v [P, G, T, C]``, in k's dtype: the output ``[P, S, H, C]`` in q's dtype and the
    scores' logsumexp ``[P, S, H]``. ``bias [P, 1, 1, T]`` is added to the scores: -inf hides a key. Every query must see
    one."""
    prompts, queries, _, dim = q.shape
    groups = k.shape[1]
    grouped = q.to(k.dtype).unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4).reshape(prompts, groups, -1, dim)
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            grouped, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
    else:
        out, lse = _plain(grouped, k, v, bias, scale)
    out = out.unflatten(2, (queries, -1)).transpose(1, 2).flatten(2, 3).to(q.dtype)
    return out, lse.unflatten(2, (queries, -1)).transpose(1, 2).flatten(2, 3)


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = accumulation_dtype(q.dtype)
    scores = (q @ k.transpose(2, 3)).to(wide) * scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def merge(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The attention to two sets of keys together, from the output and logsumexp of each (arXiv 2112.05682)."""
    (a, left), (b, right) = first, second
    share = (left - right).sigmoid().unsqueeze(-1)  # exp(left) / (exp(left) + exp(right))
    return (a * share + b * (1 - share)).to(a.dtype)
