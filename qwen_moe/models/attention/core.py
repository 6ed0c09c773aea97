"""The attention core: softmax(scale * q k^T) v over the keys that a query may see. No other file computes scores.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, C head dim.
"""

from typing import Protocol

import torch

from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.ops.block_attention import block_attention, blocks_pay
from qwen_moe.models.ops.document_attention import document_attention
from qwen_moe.models.ops.sdpa import sdpa


class Attend(Protocol):
    """``(q [B, S, H, C], k, v [B, T, G, C], visible, scale) -> [B, S, H, C]``. Query head h uses key/value head
    h // (H / G)."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scale: float
    ) -> torch.Tensor: ...


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scale: float) -> torch.Tensor:
    """Use the fastest kernel that this device has for these shapes. See `Attend`."""
    if visible.starts is not None:
        return document_attention(q, k, v, visible, scale)
    if blocks_pay(q):
        return block_attention(q, k, v, scale)
    return sdpa(q, k, v, q.shape[1] > 1, scale)
