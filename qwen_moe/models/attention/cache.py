"""What the decoder asks of a key/value cache when it reads new tokens of sequences that it has begun to read.

Shapes: N new tokens, of any number of sequences; H query heads, G key/value heads, C head dim.
"""

from typing import Protocol

import torch


class Cache(Protocol):
    """Knows which tokens of which sequences are read now. `qwen_moe.generation.cache` implements it."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted_only: bool) -> torch.Tensor:
        """Store ``k, v [1, N, G, C]`` of ``layer``, given before RoPE, and return the attention of ``q [1, N, H, C]``, also
        before RoPE, to all that these tokens see: ``[1, N, H, C]``. With ``wanted_only``, ``q`` holds only the last token of
        each prompt that ends with these tokens."""
