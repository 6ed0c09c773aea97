"""Which keys a query may see, as a value: no tensor of queries x keys is ever made.

A sequence is numbered from 0, over all its documents. Query i sees key j if start_i <= j <= i, where start_i is the number
of the first token of i's document (0 without documents). Shapes: B batch, S sequence.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

Made = TypeVar("Made")


class Span(NamedTuple):
    """Tokens ``begin`` to ``end`` of a sequence, which lie in a tensor from index ``at`` on."""

    begin: int
    end: int
    at: int


class Piece(NamedTuple):
    """Queries and keys by their indices in two tensors. Each query sees all the keys; with ``causal``, where there are as
    many keys as queries, query i sees keys 0 to i. ``rows``: of the batch."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def pieces(
    documents: Sequence[Sequence[tuple[int, int]]], queries: Iterable[Span], keys: Sequence[Span]
) -> tuple[Piece, ...]:
    """All that ``queries`` see of ``keys``, each pair of them in one piece. ``documents``: begin and end of each document,
    for each row of the batch; or of one row, for all. A span of keys holds the tokens of a span of queries, or none of them,
    so that the queries of two pieces are the same or disjoint."""
    found = []
    for query in queries:
        for key in keys:
            for number, row in enumerate(documents):
                rows = slice(None) if len(documents) == 1 else slice(number, number + 1)
                found += [piece for document in row for piece in _of_document(document, query, key, rows)]
    return tuple(found)


def _of_document(document: tuple[int, int], query: Span, key: Span, rows: slice) -> list[Piece]:
    first, last = max(document[0], query.begin), min(document[1], query.end)
    begin, end = max(document[0], key.begin), min(last, key.end)
    if first >= last or begin >= end:
        return []
    to_query, to_key = query.at - query.begin, key.at - key.begin
    own = slice(first + to_query, last + to_query)
    found = []
    if begin < first:  # keys before all the queries
        found.append(Piece(rows, own, slice(begin + to_key, min(end, first) + to_key), False))
    if end > first:
        assert key.begin <= query.begin and end == last, (query, key)
        found.append(Piece(rows, own, slice(first + to_key, last + to_key), True))
    return found


@dataclass(frozen=True)
class Visibility:
    """What the queries of a forward pass see. ``starts [B, S]``: for each token of the whole sequence, the number of its
    document's first token."""

    starts: torch.Tensor | None = None

    def is_causal(self) -> bool:
        """Whether every query sees exactly the keys up to itself."""
        return self.starts is None

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of all documents, row after row."""
        return [end - begin for row in self._documents for begin, end in row]

    @cached_property
    def _documents(self) -> list[list[tuple[int, int]]]:
        """Begin and end of every document of every row; one copy from the device, for all layers of a forward pass."""
        if self.starts is None:
            return [[(0, 1 << 62)]]
        starts = self.starts.cpu()
        length = starts.shape[1]
        first = starts == torch.arange(length)
        rows = [row.nonzero().flatten().tolist() for row in first]
        return [list(zip(row, [*row[1:], length], strict=True)) for row in rows]

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """``make()`` at the first call with ``key``, and its result from then on: all layers share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def pieces(self, queries: tuple[Span, ...], keys: tuple[Span, ...]) -> tuple[Piece, ...]:
        """What ``queries`` see of ``keys`` (see `pieces`)."""
        return self.once((queries, keys), lambda: pieces(self._documents, queries, keys))
