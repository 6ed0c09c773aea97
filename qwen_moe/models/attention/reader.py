"""How one sequence reads its cached keys: at which angles keys are cached, and how new queries attend to them.

Shapes: B sequences, S new tokens, T cached tokens, H query heads, G key/value heads, C head dim. B is 1, except for whole
sequences of one length where the reader takes several. Readers are for inference and define no gradients.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from qwen_moe.models.attention.sparse import SparsePrefill
from qwen_moe.models.attention.turned import Turned, Zone, attend_all
from qwen_moe.models.ops.sdpa import sdpa
from qwen_moe.models.rope import Rope, RotaryTables, apply_rope

_KEPT = 1 << 17  # positions of the kept tables
_LEAST = 256  # positions that a table counts for at least: those of single tokens are small but many


class Reader(Protocol):
    """One way of reading, for all layers. An instance may serve many sequences."""

    def keys(self, k: torch.Tensor, begin: int) -> torch.Tensor:
        """Keys as they are cached: ``k [B, S, G, C]`` without rotation, the first at position ``begin``."""
        ...

    def attend(self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int) -> torch.Tensor:
        """Attention of ``q [B, S, H, C]`` without rotation, at positions begin..begin+S-1, to ``keys, values
        [B, T >= begin + S, G, C]`` cached from position 0 on: ``[B, S, H, C]``. A query sees the keys up to its own
        position. S > 1 is a chunk of a prompt, S = 1 a new token."""
        ...

    @property
    def takes_several(self) -> bool:
        """Whether `keys` and `attend` take several sequences as a batch, all of their tokens from position 0 on."""
        ...


class Angles:
    """Rotary tables of a model's RoPE, and the factor of its scores (``scale``). Keeps the tables of the last positions,
    because every layer asks for the same ones."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self.scale = rope.tables(torch.zeros(1, 1), torch.float32).softmax_scale
        self._kept: dict[Hashable, RotaryTables] = {}
        self._count = 0

    def tables(self, name: Hashable, positions: Callable[[], torch.Tensor], like: torch.Tensor) -> RotaryTables:
        """The tables of ``positions() [S]``, which are always the same for one ``name``, in the dtype of ``like``."""
        key = (name, like.dtype, like.device)
        if key not in self._kept:
            made = self._rope.tables(positions().to(like.device).unsqueeze(0), like.dtype)
            self._count += _size(made)
            while self._kept and self._count > _KEPT:
                self._count -= _size(self._kept.pop(next(iter(self._kept))))
            self._kept[key] = made
        return self._kept[key]

    def rotated(self, x: torch.Tensor, begin: int) -> torch.Tensor:
        """``x [B, S, ., C]`` at positions from ``begin`` on."""
        end = begin + x.shape[1]
        return apply_rope(x, self.tables((begin, end), lambda: torch.arange(begin, end), x))


def _size(tables: RotaryTables) -> int:
    return max(tables.cos.shape[1], _LEAST)


class PlainReader:
    """Causal attention with the model's RoPE, as in training: keys are cached at the angle of their position. ``sparse``:
    for chunks of a prompt long enough that it pays."""

    def __init__(self, rope: Rope, sparse: SparsePrefill | None = None) -> None:
        self._angles = Angles(rope)
        self.sparse = sparse

    def keys(self, k: torch.Tensor, begin: int) -> torch.Tensor:
        return self._angles.rotated(k, begin)

    @property
    def takes_several(self) -> bool:
        return self.sparse is None  # which chooses, and counts, for one sequence

    def attend(self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int) -> torch.Tensor:
        queries, scale = q.shape[1], self._angles.scale
        end = begin + queries
        q = self._angles.rotated(q, begin)
        turned = [Turned(begin, end, (Zone(q, 0, end),))]
        if self.sparse is not None and self.sparse.takes(layer, q.shape[2], begin, queries):
            first = queries - self.sparse.settings.choosing
            last = [Turned(begin + first, end, (Zone(q[:, first:], 0, end),))]
            return self.sparse.attend(layer, turned, last, keys, values, scale)
        if begin == 0 or queries == 1:
            return sdpa(q, keys[:, :end], values[:, :end], queries > 1, scale)
        return attend_all(turned, keys, values, scale)
