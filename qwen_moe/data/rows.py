"""Which whole conversations or pairs share a row, from the files of `qwen-moe data chat`. Needs no torch.

An example is a conversation (one document) or a pair (two documents that follow each other, the chosen answer first). Rows
hold whole examples; what is left of a row is one more document, of padding, of which nothing is learned. Rows are numbered
over the whole run and follow from the data, the seed and the length alone, so a resumed run needs only its step, and any
number of ranks reads the same rows. Every epoch begins with a new step, so that epochs can be added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from launchers.counted import counted
from qwen_moe.data.content import document_lengths, token_dtype
from qwen_moe.data.conversations import PREFERENCE
from qwen_moe.data.manifest import LEARN, PREFERENCES, PreparedData, bin_path, column_path, read_manifest
from qwen_moe.data.packing import Packed, Share, draws, pack
from qwen_moe.errors import UserError

Longer = Literal["error", "leave out"]


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """One `.bin/.idx` pair of chat data. ``epochs``: passes over it in each epoch of the run. With ``weight`` (for all sets
    of a blend, or none), its share of the examples of an epoch, which are then as many as all sets have together."""

    prefix: Path
    epochs: int = 1
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """How examples become rows of ``length`` tokens: over ``epochs``, or as many more as ``least_rows`` need. ``seed`` None:
    in the order of the files. ``rows_per_step``: an epoch ends with a whole step, whose last rows may be empty. ``longer``:
    what to do with examples that do not fit into a row."""

    length: int
    seed: int | None = None
    epochs: int = 1
    least_rows: int = 0
    rows_per_step: int = 1
    longer: Longer = "error"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A document in a row: ``example`` counts over all sets, ``document`` in its set; ``start`` is its place in the row."""

    dataset: int
    example: int
    document: int
    start: int
    length: int


class OpenSet:
    """The examples of one prefix. ``kept`` are those that fit into a row. ``columns``: further values of each token, by
    name."""

    def __init__(self, prefix: Path, length: int, longer: Longer) -> None:
        manifest = read_manifest(prefix)
        kind = manifest.kind if manifest is not None else "documents"
        if kind == "documents" or manifest is None:
            if not bin_path(prefix).exists():
                raise UserError(
                    f"{bin_path(prefix)} does not exist: give data that `qwen-moe data chat` or `qwen-moe data pairs` made "
                    "(a prefix, without .bin)"
                )
            raise UserError(f"{prefix} holds no conversations: give data that `qwen-moe data chat` made")
        self.prefix, self.kind, self.padding = prefix, kind, manifest.end_of_document_id
        self.per_example = 2 if kind == "pairs" else 1
        self.lengths = np.array(document_lengths(prefix), np.int64)
        if len(self.lengths) % self.per_example:
            raise UserError(
                f"{prefix} has {counted(len(self.lengths), 'document')}, which are no pairs: prepare the data again"
            )
        self.columns: dict[str, np.ndarray] = {}
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.sizes = self.lengths.reshape(-1, self.per_example).sum(1)
        self.kept = np.flatnonzero(self.sizes <= length)
        self.left_out = len(self.sizes) - len(self.kept)
        if self.left_out and longer == "error":
            what = "pairs" if kind == "pairs" else "conversations"
            raise UserError(
                f"{self.left_out:,} of {len(self.sizes):,} {what} of {prefix} are longer than data.sequence_length "
                f"{length:,} (the longest has {self.sizes.max():,} tokens): raise it, or prepare the data with "
                f"--length {length}"
            )
        if not len(self.kept):
            raise UserError(
                f"{prefix} has no example of at most {counted(length, 'token')}: raise data.sequence_length"
            )
        self.tokens = np.memmap(bin_path(prefix), mode="r", dtype=token_dtype(prefix))
        self.learn = np.memmap(column_path(prefix, LEARN), mode="r", dtype=np.uint8)
        if len(self.learn) != len(self.tokens):
            raise UserError(
                f"{column_path(prefix, LEARN)} has {counted(len(self.learn), 'value')} for "
                f"{counted(len(self.tokens), 'token')}"
            )

        self.criteria, self.preferences = _preferences(prefix, manifest, len(self.sizes))

    def at(self, document: int) -> slice:
        """The tokens of a document."""
        return slice(self.starts[document], self.starts[document] + self.lengths[document])

    def documents(self, example: int) -> range:
        return range(example * self.per_example, (example + 1) * self.per_example)

    def judged(self, document: int, criteria: Sequence[str]) -> tuple[int, np.ndarray]:
        """Of an answer of a pair: the place of its last learned token, and by criterion 1 where it is the better answer, -1
        where the other is, 0 where that was not judged."""
        row = self.preferences[document // 2]
        values = [int(row[self.criteria.index(name)]) if name in self.criteria else 0 for name in criteria]
        place = int(np.flatnonzero(self.learn[self.at(document)])[-1])
        return place, np.array(values) * (1 if document % 2 == 0 else -1)


def _preferences(prefix: Path, manifest: PreparedData, pairs: int) -> tuple[list[str], np.ndarray]:
    """By which criteria pairs were judged, and the judgments ``[pairs, criteria]``. Data of earlier versions have none, and
    each chosen answer is then the better one."""
    if PREFERENCES not in manifest.columns:
        return [PREFERENCE], np.ones((pairs, 1), np.int8)
    names, path = sorted(manifest.criteria), column_path(prefix, PREFERENCES)
    if path.stat().st_size != pairs * len(names):
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, expected {len(names)} for each of {counted(pairs, 'pair')}: "
            "prepare the data "
            "again"
        )
    if not names:
        return [], np.zeros((pairs, 0), np.int8)
    return names, np.memmap(path, mode="r", dtype=np.int8, shape=(pairs, len(names)))


class Rows:
    """The rows of one epoch after another."""

    def __init__(self, sets: Sequence[OpenSet], shares: Sequence[Share], order: Order) -> None:
        self.sets, self.length, self._shares = sets, order.length, shares
        self.first_examples = np.cumsum([0, *(len(one.sizes) for one in sets)])
        self.criteria: tuple[str, ...] = ()  # of the judgments that batches hold
        self.examples = self.tokens = 0
        self.per_epoch: list[int] = []
        self._epochs: list[tuple[np.ndarray, Packed]] = []
        self._firsts = np.zeros(1, np.int64)
        while len(self._epochs) < order.epochs or len(self) < order.least_rows:
            self._add_epoch(order.seed, order.rows_per_step)

    def _add_epoch(self, seed: int | None, per_step: int) -> None:
        epoch = len(self._epochs)
        drawn = draws(self._shares, seed, epoch) if seed is not None else _in_order(self.sets)
        lengths = np.zeros(len(drawn), np.int64)
        for number, one in enumerate(self.sets):
            of_set = drawn[:, 0] == number
            drawn[of_set, 1] = one.kept[drawn[of_set, 1]]
            lengths[of_set] = one.sizes[drawn[of_set, 1]]
        packed = pack(lengths, self.length, [seed, epoch, 0] if seed is not None else None)
        self._epochs.append((drawn, packed))
        self.per_epoch.append(len(packed))
        self._firsts = np.append(self._firsts, self._firsts[-1] + -(-len(packed) // per_step) * per_step)
        self.examples, self.tokens = self.examples + len(lengths), self.tokens + int(lengths.sum())

    def __len__(self) -> int:
        """With the empty rows at the ends of epochs."""
        return int(self._firsts[-1])

    def placed(self, row: int) -> tuple[Placed, ...]:
        """The documents of a row, without padding; empty rows, and those past the last, have none."""
        if row >= len(self):
            return ()
        epoch = int(np.searchsorted(self._firsts, row, "right")) - 1
        drawn, packed = self._epochs[epoch]
        place = row - int(self._firsts[epoch])
        if place >= len(packed):
            return ()
        found, start = [], 0
        for number, example in drawn[packed.row(place)].tolist():
            for document in self.sets[number].documents(example):
                length = int(self.sets[number].lengths[document])
                index = int(self.first_examples[number]) + example
                found.append(Placed(dataset=number, example=index, document=document, start=start, length=length))
                start += length
        return tuple(found)


def _in_order(sets: Sequence[OpenSet]) -> np.ndarray:
    return np.concatenate([np.stack([np.full(len(s.kept), n), np.arange(len(s.kept))], 1) for n, s in enumerate(sets)])


def open_sets(sets: Sequence[ExampleSet], validation: Sequence[Path], order: Order) -> dict[Path, OpenSet]:
    """The opened sets by prefix, all of one kind. Raises UserError."""
    prefixes = dict.fromkeys([*(one.prefix for one in sets), *validation])
    opened = {prefix: OpenSet(prefix, order.length, order.longer) for prefix in prefixes}
    if len({one.kind for one in opened.values()}) > 1:
        named = ", ".join(f"{prefix} ({one.kind})" for prefix, one in opened.items())
        raise UserError(f"the data are of different kinds: {named}; give conversations only, or pairs only")
    return opened


def training_rows(sets: Sequence[ExampleSet], opened: dict[Path, OpenSet], order: Order) -> Rows:
    """The rows of a blend."""
    used = [opened[one.prefix] for one in sets]
    return Rows(used, shares_of(sets, used), order)


def shares_of(sets: Sequence[ExampleSet], opened: Sequence[OpenSet]) -> list[Share]:
    """How often each set is drawn from. Raises UserError for weights of some sets only, and for numbers out of range."""
    weights = [one.weight for one in sets]
    sizes = [len(one.kept) for one in opened]
    given = [Fraction(str(weight)) for weight in weights if weight is not None]
    if given and len(given) < len(sets):
        without = next(one.prefix for one in sets if one.weight is None)
        raise UserError(f"{without} has no weight and others have one: give weights to all sets, or epochs")
    for one in sets:
        if one.epochs < 1 or (one.weight is not None and not one.weight > 0):
            raise UserError(f"{one.prefix}: epochs {one.epochs} and weight {one.weight} must be positive")
        if one.weight is not None and one.epochs != 1:
            raise UserError(f"{one.prefix} has weight {one.weight} and epochs {one.epochs}: give one of them")
    if not given:
        return [Share(size=size, epochs=one.epochs) for size, one in zip(sizes, sets, strict=True)]
    drawn, total = sum(sizes), sum(given)
    return [Share(size=size, weight=weight / total, drawn=drawn) for size, weight in zip(sizes, given, strict=True)]
