"""Sparse prefill: a chunk of a long prompt attends to the columns and diagonals that matter (`vertical_slash`), and measures
what it leaves out.

A line is a column or a diagonal. Queries are taken in blocks. A block gathers the keys that are on a line of any of its
queries. Each query attends to all of these, and to the block's own keys up to itself. So it sees at least the chosen lines
and never a later key. Every chunk of a prompt chooses its own lines by its last queries, without a look at later chunks. So
later tokens of a chunk decide which keys an earlier query leaves out, as in every method that chooses in this way.

The last query of a chunk attends to all keys: what is drawn next depends on the last token of a prompt most. In the last
layer of a model it depends on that token alone, so no other query of a prompt is computed there, and nothing is chosen or
measured.

The share of attention that is kept is exp(lse of the kept keys - lse of all keys) of a query. It is measured on queries of
the chunk that did not choose the lines. With `SparseSettings.kept_share` a head's budget is doubled until their mean share
is reached, or the head attends to all keys when that costs less (after algorithm 1 of arXiv 2501.15383, which does this once
for a model and not for each text). The measured queries also decide where doubling ends, so the reported mean is slightly
too high, by a part of its sampling error.

Shapes: S queries, T keys, H query heads, G key/value heads, C head dim; the batch dim is 1.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from qwen_moe.models.attention.turned import Turned, attend_all, include
from qwen_moe.models.attention.vertical_slash import (
    FIRST_COLUMNS,
    LAST_DIAGONALS,
    Budget,
    Lines,
    choose,
    line_scores,
    row_scores,
)
from qwen_moe.models.ops.piece_attention import Partial

PUBLISHED = Budget(1000, 6096)  # of MInference, for a head that no search has looked at
SMALLEST = Budget(FIRST_COLUMNS + 32, LAST_DIAGONALS + 4)
# Time of a pair of a query and a gathered key, against a pair of dense attention: 1.5 with 512 rows on a CPU.
_GATHERED = 1.5
_HALVINGS = 2


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """``kept_share``: the share of attention that a head's mean query keeps; None keeps the given budgets. ``budgets``: of
    each head of each layer, from which budgets are raised; without them they begin at `SMALLEST`, or are `PUBLISHED` if
    ``kept_share`` is None. Attention to fewer than ``threshold`` keys is dense. ``choosing``: how many of the last queries
    choose lines; as many others, drawn by ``seed``, measure. ``rows``: queries in a block. ``first_head``: the number in the
    model of the first head, where heads are split over ranks."""

    kept_share: float | None = 0.95
    budgets: tuple[tuple[Budget, ...], ...] = ()
    threshold: int = 32768
    choosing: int = 64
    rows: int = 512
    seed: int = 0
    first_head: int = 0

    def budget(self, layer: int, head: int) -> Budget:
        if self.budgets:
            return self.budgets[layer][self.first_head + head]
        return PUBLISHED if self.kept_share is None else SMALLEST


@dataclass(kw_only=True)
class LayerRecord:
    """Of one layer, over all chunks and heads: query-key pairs attended to, those that dense attention would have, and those
    spent on choosing and measuring; chunks of heads that were read sparsely and densely; and of the sparse chunks the
    queries, the sum over queries of the mean share that was measured, and the lowest share of a measured query."""

    pairs: int = 0
    dense_pairs: int = 0
    choosing_pairs: int = 0
    sparse_heads: int = 0
    dense_heads: int = 0
    queries: int = 0
    kept: float = 0.0
    worst: float = 1.0

    def add(self, other: "LayerRecord") -> None:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, min(mine, value) if name == "worst" else mine + value)

    @property
    def mean(self) -> float:
        """The share of attention that the mean query of a sparse head keeps."""
        return self.kept / self.queries if self.queries else 1.0


@dataclass
class SparseRecord:
    """What sparse attention did, by layer."""

    layers: dict[int, LayerRecord] = field(default_factory=dict)

    def layer(self, layer: int) -> LayerRecord:
        return self.layers.setdefault(layer, LayerRecord())

    @classmethod
    def joined(cls, records: Iterable["SparseRecord"]) -> "SparseRecord":
        """What several ranks did, each with heads, layers or prompts of its own."""
        whole = cls()
        for record in records:
            for layer, of in record.layers.items():
                whole.layer(layer).add(of)
        return whole

    @property
    def work(self) -> float:
        """Query-key pairs, those of choosing and measuring included, against those of dense attention."""
        of = self.layers.values()
        dense = sum(layer.dense_pairs for layer in of)
        return sum(layer.pairs + layer.choosing_pairs for layer in of) / dense if dense else 1.0

    def shares(self) -> dict[str, float]:
        """The share of attention that the mean query of a sparse head ``kept``, the same of the worst layer, and ``work``.
        Empty if no chunk was read sparsely."""
        sparse = [layer for layer in self.layers.values() if layer.queries]
        if not sparse:
            return {}
        kept = sum(layer.kept for layer in sparse) / sum(layer.queries for layer in sparse)
        return {"kept": kept, "kept_worst_layer": min(layer.mean for layer in sparse), "work": self.work}


@dataclass(frozen=True)
class _Measure:
    """Queries at positions ``rows`` with their ``scores [N, T]`` and the logsumexp of these ``[N]``; ``blocks``: begin and
    end of each one's block."""

    rows: list[int]
    scores: torch.Tensor
    lse: torch.Tensor
    blocks: list[tuple[int, int]]

    def kept(self, lines: Lines) -> tuple[torch.Tensor, float]:
        """The share of attention that each query keeps ``[N]``, and the mean number of keys that a query attends to."""
        logs, keys, held, before = [], 0.0, (-1, -1), torch.empty(0)
        for scores, row, block in zip(self.scores, self.rows, self.blocks, strict=True):
            if block != held:
                held, before = block, lines.keys_before(*block)
            logs.append(torch.cat([scores[before], scores[block[0] : row + 1]]).logsumexp(0))
            keys += len(before) + (block[1] - block[0] + 1) / 2
        return (torch.stack(logs) - self.lse).exp(), keys / len(self.rows)


class _Trial(NamedTuple):
    """Lines of a budget, the share of attention that each measured query keeps with them, and its mean number of keys."""

    budget: Budget
    lines: Lines
    shares: torch.Tensor
    keys: float

    @property
    def share(self) -> float:
        return float(self.shares.mean())

    def costs_less_than(self, dense: float) -> bool:
        """Whether these keys, which have to be gathered, cost less than ``dense`` keys that do not."""
        return self.keys * _GATHERED < dense


def _search(tried: Callable[[Budget], _Trial], first: Budget, wanted: float | None, dense: float) -> _Trial:
    """The first budget, doubled until ``wanted`` is kept or ``dense`` keys would cost less: of its columns and its diagonals
    those that add more share for a key. Then a part of the last doubling is given back, if less of it suffices."""
    best = below = tried(first)
    if wanted is None:
        return best
    while best.share < wanted and best.costs_less_than(dense):
        below = best
        larger = [tried(budget) for budget in best.budget.raised()]
        best = max(larger, key=lambda trial: (trial.share - below.share) / max(trial.keys - below.keys, 1.0))
    for _ in range(_HALVINGS if below is not best and best.share >= wanted else 0):
        middle = tried(Budget(*((low + high) // 2 for low, high in zip(below.budget, best.budget, strict=True))))
        below, best = (below, middle) if middle.share >= wanted else (middle, best)
    return best


@dataclass(frozen=True)
class _Chosen:
    """A head's lines, None to attend to all keys, and the measured shares ``[N]``."""

    lines: Lines | None
    shares: torch.Tensor


class SparsePrefill:
    """Attention of chunks of prompts to the keys that matter. ``record`` says what was left out."""

    def __init__(self, settings: SparseSettings | None = None) -> None:
        self.settings = settings or SparseSettings()
        self.record = SparseRecord()

    def takes(self, layer: int, heads: int, begin: int, queries: int) -> bool:
        """Whether ``queries`` after ``begin`` keys are a chunk long enough to choose lines for. Counts the pairs of a chunk
        that is not."""
        if begin + queries >= self.settings.threshold and queries > 4 * self.settings.choosing:
            return True
        if queries > 1:
            record, pairs = self.record.layer(layer), heads * _pairs(begin, begin + queries)
            record.pairs += pairs
            record.dense_pairs += pairs
        return False

    def attend(
        self,
        layer: int,
        turned: Sequence[Turned],
        last: Sequence[Turned],
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of all queries of ``turned``, ``[1, S, H, C]``. ``last``: the last queries, `SparseSettings.choosing` of
        them, at the positions that choose. ``keys, values [1, T, G, C]``, of which nothing after the last query is read."""
        outs = []
        heads = turned[0].zones[0].q.shape[2]
        end = turned[-1].end
        for head in range(heads):
            group = head * keys.shape[2] // heads
            k, v = keys[:, :end, group : group + 1], values[:, :end, group : group + 1]
            mine, choosing = ([_of_head(part, head) for part in parts] for parts in (turned, last))
            outs.append(self.attend_head(layer, head, mine, choosing, k, v, scale))
        return torch.cat(outs, 2)

    def attend_head(
        self,
        layer: int,
        head: int,
        turned: Sequence[Turned],
        last: Sequence[Turned],
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """`attend` for one head, ``[1, S, 1, C]``."""
        chosen = self._choose(layer, head, turned, last, keys[0, :, 0], scale)
        if chosen.lines is None:
            out, pairs = attend_all(turned, keys, values, scale), _pairs(turned[0].begin, turned[-1].end)
        else:
            out, pairs = _attend_lines(self._blocks(turned), chosen.lines, keys, values, scale)
            out[:, -1:] = attend_all([_last_query(turned[-1])], keys, values, scale)
        self._note(layer, turned, chosen, pairs)
        return out

    def _blocks(self, turned: Sequence[Turned]) -> Iterator[Turned]:
        """Consecutive queries of one part at a time, at most `rows`."""
        for part in turned:
            count = part.end - part.begin
            blocks = -(-count // self.settings.rows)
            for number in range(blocks):
                begin, end = number * count // blocks, (number + 1) * count // blocks
                zones = tuple(zone._replace(q=zone.q[:, begin:end]) for zone in part.zones)
                yield Turned(part.begin + begin, part.begin + end, zones)

    def _choose(
        self,
        layer: int,
        head: int,
        turned: Sequence[Turned],
        last: Sequence[Turned],
        keys: torch.Tensor,
        scale: float,
    ) -> _Chosen:
        """Lines of one head with ``keys [T, C]`` that keep the wanted share, or none if all keys cost less."""
        rows = torch.arange(last[0].begin, last[-1].end, device=keys.device)
        vertical, slash = line_scores(row_scores(last, rows, keys, scale))
        measure = self._measure(layer, head, turned, keys, scale)
        dense = sum(measure.rows) / len(measure.rows) + 1

        def tried(budget: Budget) -> _Trial:
            lines = choose(vertical, slash, budget)
            return _Trial(budget, lines, *measure.kept(lines))

        best = _search(tried, self.settings.budget(layer, head), self.settings.kept_share, dense)
        if not best.costs_less_than(dense):
            return _Chosen(None, torch.ones_like(best.shares))
        return _Chosen(best.lines, best.shares)

    def _measure(self, layer: int, head: int, turned: Sequence[Turned], keys: torch.Tensor, scale: float) -> _Measure:
        """Queries that do not choose, drawn so that the same text gives the same ones."""
        count, begin, end = self.settings.choosing, turned[0].begin, turned[-1].end
        name = f"{self.settings.seed} {layer} {self.settings.first_head + head} {begin}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(end - begin - count, generator=generator)[:count].sort().values + begin
        scores = row_scores(turned, drawn.to(keys.device), keys, scale)
        bounds = iter([(block.begin, block.end) for block in self._blocks(turned)])
        blocks, held = [], next(bounds)
        for row in drawn.tolist():
            while row >= held[1]:
                held = next(bounds)
            blocks.append(held)
        return _Measure(drawn.tolist(), scores, scores.logsumexp(-1), blocks)

    def _note(self, layer: int, turned: Sequence[Turned], chosen: _Chosen, pairs: int) -> None:
        record, begin, end = self.record.layer(layer), turned[0].begin, turned[-1].end
        record.dense_pairs += _pairs(begin, end)
        record.pairs += pairs
        record.choosing_pairs += 2 * self.settings.choosing * end
        if chosen.lines is None:
            record.dense_heads += 1
            return
        queries = end - begin
        record.choosing_pairs += end  # of the last query, which attends to all
        record.sparse_heads += 1
        record.queries += queries
        record.kept += queries * float(chosen.shares.mean())
        record.worst = min(record.worst, float(chosen.shares.min()))


def _of_head(part: Turned, head: int) -> Turned:
    zones = tuple(zone._replace(q=zone.q[:, :, head : head + 1]) for zone in part.zones)
    return part._replace(zones=zones)


def _last_query(part: Turned) -> Turned:
    zones = tuple(zone._replace(q=zone.q[:, -1:]) for zone in part.zones)
    return Turned(part.end - 1, part.end, zones)


def _pairs(begin: int, end: int) -> int:
    """How many keys the queries ``begin`` to ``end`` see, summed."""
    return (end * (end + 1) - begin * (begin + 1)) // 2


def _attend_lines(
    blocks: Iterator[Turned], lines: Lines, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, int]:
    """Attention of one head's ``blocks`` to ``keys, values [1, T, 1, C]`` on ``lines`` and in the block itself, and the
    number of query-key pairs."""
    outs, pairs = [], 0
    for block in blocks:
        count = block.end - block.begin
        before = lines.keys_before(block.begin, block.end)
        own = block.zones[-1].q
        found = Partial(own)
        include(found, own, keys[:, block.begin : block.end], values[:, block.begin : block.end], True, scale)
        for zone in block.zones:
            of = before if len(block.zones) == 1 else before[(before >= zone.begin) & (before < zone.end)]
            if len(of):
                include(found, zone.q, keys[:, of], values[:, of], False, scale)
        outs.append(found.out.to(own.dtype))
        pairs += count * len(before) + count * (count + 1) // 2
    return torch.cat(outs, 1), pairs
