"""Dual chunk attention (arXiv 2402.17463): texts longer than the model was trained on, without a new distance.

A chunk advances by s = chunk_size - local_size tokens. Keys are at positions j mod s, so that a cached key never changes,
and a query is rotated three times, once for each kind of key:

    keys of its own chunk              i mod s                 the true distance
    of the chunk before                min(i mod s + s, M)     the true distance, up to M
    of all earlier chunks              min(2 s - 1, M)         near M, whatever the true distance is

M is the largest position that was trained. Positions begin at 0, so a text of chunk_size tokens has distances up to
chunk_size - 1, which is the paper's M and the figure in the report on Qwen2.5-1M (arXiv 2501.15383). The code published with
the paper, and vLLM's, have M = chunk_size, a distance that no training text had; ``clamp: code`` reproduces them.

Beyond original_max_position_embeddings L the scores are multiplied by f^2, f = 0.1 ln(n / L) + 1, where n = i + 1 is the
number of tokens up to the query. So f belongs to the position: reading in chunks, all at once or token by token is the same.
(vLLM takes the length of the whole prompt for all its queries, and scales keys by the f of the time when they were cached.)

Shapes: S new tokens, T cached tokens, H query heads, G key/value heads, C head dim.
"""

from collections.abc import Callable

import torch

from qwen_moe.config import DualChunk
from qwen_moe.models.attention.reader import Angles
from qwen_moe.models.attention.sparse import SparsePrefill
from qwen_moe.models.attention.turned import Turned, Zone, attend_all
from qwen_moe.models.rope import Rope, apply_rope


class DualChunkReader:
    """Reads with dual chunk attention. See `Reader`. Where the text is not longer than ``config.plain_length`` it reads as
    `PlainReader` does. ``sparse``: for chunks of a prompt long enough that it pays; lines are chosen at continuous
    positions, and everything else, the measured share too, is at the positions of dual chunk attention."""

    def __init__(self, rope: Rope, config: DualChunk, sparse: SparsePrefill | None = None) -> None:
        self._angles = Angles(rope)
        self.sparse = sparse
        self._config = config
        self._stride = config.stride
        self._largest = config.chunk_size - (config.clamp == "trained")

    @property
    def takes_several(self) -> bool:
        return False

    def keys(self, k: torch.Tensor, begin: int) -> torch.Tensor:
        first, count = begin % self._stride, k.shape[1]
        return self._rotated(k, ("keys", first, count), lambda: torch.arange(first, first + count) % self._stride)

    def attend(self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int) -> torch.Tensor:
        turned = self.turned(q, begin)
        queries = q.shape[1]
        if self.sparse is not None and self.sparse.takes(layer, q.shape[2], begin, queries):
            first = queries - self.sparse.settings.choosing
            last = self.turned(q[:, first:], begin + first, continuous=True)
            return self.sparse.attend(layer, turned, last, keys, values, self._angles.scale)
        return attend_all(turned, keys, values, self._angles.scale)

    def turned(self, q: torch.Tensor, begin: int, continuous: bool = False) -> list[Turned]:
        """``q [1, S, H, C]`` from position ``begin`` on, rotated for the keys of each kind, one part for each chunk.
        ``continuous``: positions i mod s + s and i mod s + chunk_size, which grow by one from query to query. A line of
        keys at one distance from their queries is a line of high scores only at such positions."""
        end, parts = begin + q.shape[1], []
        while begin < end:
            chunk = begin // self._stride
            stop = min(end, (chunk + 1) * self._stride)
            part, q = q[:, : stop - begin], q[:, stop - begin :]
            parts.append(self._of_chunk(self._scaled(part, begin), begin, stop, continuous))
            begin = stop
        return parts

    def _of_chunk(self, q: torch.Tensor, begin: int, end: int, continuous: bool) -> Turned:
        stride = self._stride
        own = begin // stride * stride  # the first key of the queries' chunk
        first, last = begin - own, end - own
        before, inter = max(own - stride, 0), min(2 * stride - 1, self._largest)
        positions: list[tuple[str, int, int, Callable[[], torch.Tensor]]] = [
            ("inter", 0, before, lambda: torch.full((last - first,), inter)),
            ("successive", before, own, lambda: torch.arange(first, last).add_(stride).clamp_(max=self._largest)),
            ("intra", own, end, lambda: torch.arange(first, last)),
        ]
        if continuous:
            size = self._config.chunk_size
            positions[0] = ("far", 0, before, lambda: torch.arange(first, last).add_(size))
            positions[1] = ("near", before, own, lambda: torch.arange(first, last).add_(stride))
        zones = [
            Zone(self._rotated(q, (kind, first, last), at), zone_begin, zone_end)
            for kind, zone_begin, zone_end, at in positions
            if zone_begin < zone_end
        ]
        return Turned(begin, end, tuple(zones))

    def _scaled(self, q: torch.Tensor, begin: int) -> torch.Tensor:
        """Queries times f^2 of their positions."""
        trained, end = self._config.original_max_position_embeddings, begin + q.shape[1]
        if trained is None or end <= trained:
            return q
        lengths = torch.arange(begin + 1, end + 1, dtype=torch.float64, device=q.device)
        factors = (lengths / trained).log_().mul_(0.1).add_(1).clamp_(min=1).square_()
        return q * factors.to(q.dtype)[:, None, None]

    def _rotated(
        self, x: torch.Tensor, name: tuple[str, int, int], positions: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        return apply_rope(x, self._angles.tables(name, positions, x))
