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

    def ranges(self, zone: Zone) -> list[tuple[int, int, bool]]:
        """What the queries see of ``zone``: begin and end of keys that all of them see, or (True) that each sees up to its
        own."""
        if self.end - self.begin == 1:
            return [(zone.begin, zone.end, False)]
        before = min(zone.end, self.begin)
        earlier = [(zone.begin, before, False)] if zone.begin < before else []
        return earlier + ([(self.begin, self.end, True)] if zone.end > self.begin else [])


def include(
    found: Partial, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scale: float
) -> None:
    """Add to ``found`` what all its queries ``q [1, S, H, C]`` see of ``keys, values [1, N, G, C]``: all keys, or with
    ``causal`` (N = S) those up to each. Other keys are not given, because `Partial` may widen all that it gets."""
    found.add(q, keys, values, [Piece(slice(None), slice(0, q.shape[1]), slice(None), causal)], scale)


def attend_all(turned: Iterable[Turned], keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of consecutive queries to every key that they see of ``keys, values [1, T, G, C]``: ``[1, S, H, C]``.
    Scores are multiplied by ``scale``."""
    outs = []
    for part in turned:
        found = Partial(part.zones[0].q)
        for zone in part.zones:
            for begin, end, causal in part.ranges(zone):
                include(found, zone.q, keys[:, begin:end], values[:, begin:end], causal, scale)
        outs.append(found.out.to(part.zones[0].q.dtype))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
