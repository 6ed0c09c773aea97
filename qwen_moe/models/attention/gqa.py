"""Causal grouped-query attention (arXiv 2305.13245) with QKV bias or QK-norm.

Shapes: B batch, S sequence, D hidden, H query heads, G key/value heads, C head dim.
"""

import torch
from torch import nn

from qwen_moe.config import ModelConfig
from qwen_moe.models.attention.core import Attend, attend
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.linear import Linear, Project, project
from qwen_moe.models.norm import RMSNorm
from qwen_moe.models.rope import RotaryTables, apply_rope


class Attention(nn.Module):
    """Project, rotate, attend, project: ``forward(x [B, S, D], rotary, visible) -> [B, S, D]``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim, self.qk_norm = layer, dim, config.qk_norm
        self.q_proj = Linear(config.hidden_size, heads * dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * dim, bias=config.qkv_bias)
        self.o_proj = Linear(heads * dim, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        # Sharding replaces these for tensor parallelism or other kernels.
        self.project: Project = project
        self.attend: Attend = attend

    def unrotated_heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[B, S, H, C]``, keys and values ``[B, S, G, C]``, before RoPE."""
        projected = self.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def heads(self, x: torch.Tensor, rotary: RotaryTables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[B, S, H, C]`` and keys ``[B, S, G, C]``, rotated, and values ``[B, S, G, C]``."""
        q, k, v = self.unrotated_heads(x)
        return apply_rope(q, rotary), apply_rope(k, rotary), v

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """``[B, S, H, C] -> [B, S, D]``."""
        return self.o_proj(y.flatten(2))

    def forward(self, x: torch.Tensor, rotary: RotaryTables, visible: Visibility) -> torch.Tensor:
        return self.output(self.attend(*self.heads(x, rotary), visible, rotary.softmax_scale))
