"""Queries that are rotated differently for different ranges of keys, and attention of all of them to all that they see.

Shapes: S queries, T cached keys, H query heads, G key/value heads, C head dim; the batch dim is 1.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from qwen_moe.models.attention.mask import Piece
from qwen_moe.models.ops.piece_attention import Partial


class Zone(NamedTuple):
    """Keys ``begin`` to ``end``, and queries ``[1, S, H, C]`` rotated as these keys see them."""

    q: torch.Tensor
    begin: int
    end: int


class Turned(NamedTuple):
    """Queries ``begin`` to ``end`` of a sequence, and the zones of keys that they see, in order from key 0 to key ``end``.
    The last zone holds the keys of the queries themselves."""

    begin: int
    end: int
    zones: tuple[Zone, ...]

    def pieces(self, zone: Zone) -> Iterable[Piece]:
        """What the queries see of ``zone``, by their number among these queries and by the keys' number."""
        every = slice(None)
        queries = slice(0, self.end - self.begin)
        if self.end - self.begin == 1:
            return (Piece(every, queries, slice(zone.begin, zone.end), False),)
        before, found = min(zone.end, self.begin), []
        if zone.begin < before:
            found.append(Piece(every, queries, slice(zone.begin, before), False))
        if zone.end > self.begin:
            found.append(Piece(every, queries, slice(self.begin, self.end), True))
        return found


def attend_all(turned: Iterable[Turned], keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of consecutive queries to every key that they see of ``keys, values [1, T, G, C]``: ``[1, S, H, C]``.
    Scores are multiplied by ``scale``."""
    outs = []
    for part in turned:
        found = Partial(part.zones[0].q)
        for zone in part.zones:
            found.add(zone.q, keys, values, part.pieces(zone), scale)
        outs.append(found.out.to(part.zones[0].q.dtype))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
