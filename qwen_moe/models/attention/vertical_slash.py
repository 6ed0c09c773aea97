"""Which keys matter to a head: columns and diagonals of its matrix of scores (MInference, arXiv 2407.02490).

A column is a key that every query attends to, a diagonal is the key at one distance from each query. The last queries of a
chunk choose them. Shapes: S queries, T keys, N rows of scores, H query heads, C head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qwen_moe.models.attention.turned import Turned
from qwen_moe.models.ops.dtypes import accumulation_dtype

FIRST_COLUMNS = 30  # always kept, as in MInference and vLLM: the first tokens collect what a head has no use for
LAST_DIAGONALS = 100  # always kept: the nearest keys


class Budget(NamedTuple):
    """How many columns and diagonals a head keeps, including those that are always kept."""

    vertical: int
    slash: int

    def raised(self) -> tuple["Budget", "Budget"]:
        """With twice the columns, and with twice the diagonals, not counting those that are always kept."""
        columns = max(2 * self.vertical - FIRST_COLUMNS, FIRST_COLUMNS + 1)
        diagonals = max(2 * self.slash - LAST_DIAGONALS, LAST_DIAGONALS + 1)
        return Budget(columns, self.slash), Budget(self.vertical, diagonals)


def row_scores(turned: Sequence[Turned], rows: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores ``[N, T]`` of the queries at positions ``rows [N]`` (ascending) with ``keys [T, C]``, -inf for keys after the
    query. ``turned``: of one head."""
    wide = accumulation_dtype(keys.dtype)
    scores = torch.empty(len(rows), len(keys), dtype=wide, device=keys.device)

    def include(q: torch.Tensor, first: int, begin: int, end: int) -> None:
        torch.mm(q * scale, keys[begin:end].to(wide).T, out=scores[first : first + len(q), begin:end])

    # The first zones of all parts begin with the first key and hold nearly all keys: one product reads these once. What it
    # says of keys after a row's first zone is overwritten.
    firsts, rest = [], []
    for part in turned:
        of_part = torch.nonzero((rows >= part.begin) & (rows < part.end)).flatten()
        if len(of_part):
            first, last = int(of_part[0]), int(of_part[-1]) + 1
            queries = [zone.q[0, rows[first:last] - part.begin, 0].to(wide) for zone in part.zones]
            firsts.append((queries[0], part.zones[0].end))
            rest += [(q, first, zone.begin, zone.end) for q, zone in zip(queries[1:], part.zones[1:], strict=True)]
    include(torch.cat([q for q, _ in firsts]), 0, 0, max(end for _, end in firsts))
    for later in rest:
        include(*later)
    for number, row in enumerate(rows.tolist()):
        scores[number, row + 1 :] = float("-inf")
    return scores


def line_scores(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last N queries of T attend to by column and by diagonal, ``[T]`` each, from their ``scores [N, T]``: sums of
    probabilities over the queries. Diagonal d is key i - d of query i."""
    count, length = scores.shape
    p = scores.softmax(-1)
    reversed_slash = p.new_zeros(length + count - 1)
    for number in range(count):
        reversed_slash[count - 1 - number :][:length] += p[number]
    return p.sum(0), reversed_slash[:length].flip(0)


@dataclass(frozen=True)
class Lines:
    """Columns: keys ``columns``; diagonals: key i - d of query i for each d of ``diagonals``. Both are ascending."""

    columns: torch.Tensor
    diagonals: torch.Tensor

    def keys_before(self, begin: int, end: int) -> torch.Tensor:
        """The keys before ``begin`` that are on a line of any of the queries ``begin`` to ``end``, each once. Diagonals of
        several queries are ranges; those that overlap are one."""
        rows, device = end - begin, self.diagonals.device
        nearest, farthest = self._ranges(rows)
        first, last = (begin - farthest).clamp_(0, begin), (end - nearest).clamp_(0, begin)
        sizes = (last - first).clamp_(min=0)
        ends = sizes.cumsum(0)
        count = int(ends[-1]) if len(ends) else 0
        found = torch.arange(count, device=device)
        found += torch.repeat_interleave(first - (ends - sizes), sizes, output_size=count)
        columns = self.columns[self.columns < begin]
        # Column j is in a range if a diagonal d has begin <= j + d < end.
        at = torch.searchsorted(self.diagonals, begin - columns)
        nearest_above = torch.cat([self.diagonals, self.diagonals.new_full((1,), end + 1)])[at]
        return torch.cat([found, columns[nearest_above >= end - columns]])

    def _ranges(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest and the farthest diagonal of each run of diagonals whose ranges of keys overlap or touch for
        ``rows`` queries."""
        gaps = self.diagonals.diff() > rows
        edge = gaps.new_ones(min(1, len(self.diagonals)))
        return self.diagonals[torch.cat([edge, gaps])], self.diagonals[torch.cat([gaps, edge])]


def choose(vertical: torch.Tensor, slash: torch.Tensor, budget: Budget) -> Lines:
    """The columns and diagonals with the highest scores ``[T]`` each, and those that are always kept."""
    found = []
    for scores, size, always in (
        (vertical, budget.vertical, FIRST_COLUMNS),
        (slash, budget.slash, LAST_DIAGONALS),
    ):
        scores = scores.clone()
        scores[:always] = float("inf")
        found.append(scores.topk(min(max(size, always), len(scores))).indices.sort().values)
    return Lines(*found)
