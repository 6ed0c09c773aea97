"""Attention inside documents on a GPU, by torch's flex_attention: blocks that no document needs are skipped.

Shapes: B batch, S sequence, H query heads, G key/value heads, C head dim.
"""

import functools
from typing import Any

import torch

from qwen_moe.models.attention.mask import Visibility


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # uncompiled, it makes all scores


def block_mask(starts: torch.Tensor) -> Any:
    """Which blocks of keys the blocks of queries need, where token i sees tokens ``starts[b, i]`` to i."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key >= starts[row, query])

    batch, seq = starts.shape
    return create_block_mask(sees, batch, None, seq, seq, device=str(starts.device))


def document_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scale: float
) -> torch.Tensor:
    """``q [B, S, H, C], k, v [B, S, G, C] -> [B, S, H, C]``; ``visible`` has documents."""
    starts = visible.starts
    assert starts is not None
    mask = visible.once("block mask", lambda: block_mask(starts))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return _flex()(*heads, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
