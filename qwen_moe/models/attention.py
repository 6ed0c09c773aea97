"""Causal grouped-query attention (arXiv 2305.13245) with QKV bias or QK-norm, and its key/value cache.

Shapes: B batch, S sequence, D hidden, H query heads, G key/value heads, C head dim.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from parallel.gemm import widen
from qwen_moe.config import ModelConfig
from qwen_moe.models.block_attention import block_attention, blocks_pay
from qwen_moe.models.linear import Linear, Project, project
from qwen_moe.models.norm import RMSNorm
from qwen_moe.models.rope import apply_rope


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far, per layer, each ``[B, G, S, C]``; grown by doubling."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, G, S_new, C]`` and return all keys and values. The caller advances ``length`` after a step."""
        end = self.length + k.shape[2]
        for store, new in ((self.keys, k), (self.values, v)):
            held = store.get(layer)
            if held is None or held.shape[2] < end:
                grown = new.new_empty(*new.shape[:2], max(2 * end, 64), new.shape[3])
                if held is not None:
                    grown[:, :, : self.length] = held[:, :, : self.length]
                store[layer] = grown
            store[layer][:, :, self.length : end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """``forward(x [B, S, D], cos, sin [B or 1, S, C/2]) -> [B, S, D]``.

    ``mask``: None for plain causal, else boolean ``[B, 1, S, S_all]``, True where a query may look.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim = layer, dim
        self.q_proj = Linear(config.hidden_size, heads * dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * dim, bias=config.qkv_bias)
        self.o_proj = Linear(heads * dim, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.project: Project = project

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        projected = self.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if mask is None and cache is None and blocks_pay(q):
            return self.o_proj(block_attention(q, k, v).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(
            widen(q), widen(k), widen(v), attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(y.to(x.dtype).transpose(1, 2).flatten(2))
