"""Causal attention inside each document of packed sequences, at the cost of the documents: no mask of queries and keys.

On a CPU every document is a sequence of its own. On a GPU, where many small kernels are slow, torch's flex_attention skips
the blocks that no document needs. Shapes: B batch, S sequence, H query heads, G key/value heads, C head dim.
"""

import functools
from typing import Any

import torch

from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.ops.sdpa import sdpa


def _one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """``lengths`` of the documents of all rows, one after another."""
    batch = q.shape[0]
    queries, keys, values = (x.flatten(0, 1).unsqueeze(0).split(lengths, 1) for x in (q, k, v))
    outputs = [sdpa(*document, True, scale) for document in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, 1).squeeze(0).unflatten(0, (batch, -1))


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
    if q.device.type == "cpu":
        return _one_by_one(q, k, v, visible.lengths, scale)
    mask = visible.once("block mask", lambda: block_mask(starts))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return _flex()(*heads, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
