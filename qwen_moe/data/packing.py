"""Which examples an epoch draws, in which order, and which of them share a row. Each is a function of the sizes of the sets,
the lengths of the examples, a seed and the number of the epoch; nothing is remembered between epochs.

Random numbers are those of numpy's RandomState, whose streams are the same in every version of numpy.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qwen_moe.errors import UserError

# Examples are packed together from a stretch of the order that fills this many rows, so at most about one row in so many is
# partly empty for want of short examples.
ROWS_PER_WINDOW = 256


@dataclass(frozen=True, kw_only=True)
class Share:
    """How often a set of ``size`` examples is drawn from. ``epochs``: passes in each epoch of the blend. Or ``weight``: its
    share, as a part of 1, of the ``drawn`` draws of each epoch of the blend."""

    size: int
    epochs: int = 1
    weight: Fraction | None = None
    drawn: int = 0

    def before(self, epoch: int) -> int:
        """The number of draws from the set in the epochs before ``epoch``. Of a share that is no whole number, the rest goes
        into the next epoch, so that after any number of epochs the share is right to within half an example."""
        if self.weight is None:
            return self.size * self.epochs * epoch
        return int(self.weight * self.drawn * epoch + Fraction(1, 2))


def draws(shares: Sequence[Share], seed: int, epoch: int) -> np.ndarray:
    """``[n, 2]`` int64: (set, example) of each draw of an epoch, in order. Each set is drawn from in passes, in each of
    which every example comes once, in an order of its own; the draws of the sets are spread evenly over the epoch."""
    parts, times = [], []
    for number, share in enumerate(shares):
        first, after = share.before(epoch), share.before(epoch + 1)
        found = []
        while first < after:
            round_, begin = divmod(first, share.size)
            end = min(share.size, begin + after - first)
            found.append(np.random.RandomState([seed, number, round_]).permutation(share.size)[begin:end])
            first += end - begin
        examples = np.concatenate([np.zeros(0, np.int64), *found])
        parts.append(np.stack([np.full(len(examples), number), examples], 1))
        times.append((np.arange(len(examples)) + 0.5) / max(1, len(examples)))
    order = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(parts)[order].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows of examples: row r holds ``members[bounds[r] : bounds[r + 1]]``, which are places in the order of draws."""

    members: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, number: int) -> np.ndarray:
        return self.members[self.bounds[number] : self.bounds[number + 1]]


def pack(lengths: np.ndarray, row: int, shuffle: Sequence[int] | None) -> Packed:
    """Pack examples of ``lengths [n]`` tokens (in the order of draws) into rows of at most ``row`` tokens, whole.

    Best fit, longest first, within windows of the order of about `ROWS_PER_WINDOW` rows. The rows of a window are shuffled
    by the seed ``shuffle``, so that no row's place tells the length of its examples; None keeps the order of first examples.
    Raises UserError if an example is longer than a row.
    """
    if len(lengths) and lengths.max() > row:
        raise UserError(f"an example has {lengths.max():,} tokens, more than a row of {row:,}: leave it out")
    before = np.cumsum(lengths) - lengths
    windows = before // (row * ROWS_PER_WINDOW)
    edges = np.flatnonzero(np.diff(windows, prepend=-1, append=-1) != 0) if len(lengths) else np.zeros(1, np.int64)
    rows: list[list[int]] = []
    for number, (first, after) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist())):
        found = [sorted(first + place for place in places) for places in _best_fit(lengths[first:after], row)]
        found.sort()
        if shuffle is not None:
            order = np.random.RandomState([*shuffle, number]).permutation(len(found))
            found = [found[place] for place in order]
        rows += found
    members = np.array([place for places in rows for place in places], np.int64)
    return Packed(members=members, bounds=np.cumsum([0, *map(len, rows)], dtype=np.int64))


def _best_fit(lengths: np.ndarray, row: int) -> list[list[int]]:
    """Places of the examples of each row: each example, longest first, goes where the least room is left after it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        at = bisect_left(room, (length, 0))
        if at == len(room):
            rows.append([place])
            insort(room, (row - length, len(rows) - 1))
        else:
            left, number = room.pop(at)
            rows[number].append(place)
            insort(room, (left - length, number))
    return rows
