"""Rows of whole conversations or pairs for training, from the files of `qwen-moe data chat`.

An example is a conversation (one document) or a pair (two documents that follow each other, the chosen answer first). Rows
hold whole examples; what is left of a row is one more document, of padding, of which nothing is learned. Rows are numbered
over the whole run and follow from the data, the seed and the length alone, so a resumed run needs only its step, and any
number of ranks reads the same rows. Every epoch begins with a new row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from parallel.sequence import Batch
from qwen_moe.config import Dataset
from qwen_moe.data.content import document_lengths, token_dtype
from qwen_moe.data.conversations import PREFERENCE
from qwen_moe.data.made_with import check_tokenizers
from qwen_moe.data.manifest import LEARN, PREFERENCES, PreparedData, bin_path, column_path, read_manifest
from qwen_moe.data.packing import ROWS_PER_WINDOW, Packed, Share, draws, pack
from qwen_moe.data.ranks import verified_on_all_ranks
from qwen_moe.data.samples import IGNORE
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
class Placed:
    """A document in a row: ``example`` counts over all sets, ``document`` in its set; ``start`` is its place in the row."""

    dataset: int
    example: int
    document: int
    start: int
    length: int


class _OpenSet:
    """The examples of one prefix. ``kept`` are those that fit into a row."""

    def __init__(self, prefix: Path, length: int, longer: Longer) -> None:
        manifest = read_manifest(prefix)
        kind = manifest.kind if manifest is not None else "documents"
        if kind == "documents" or manifest is None:
            raise UserError(f"{prefix} holds no conversations: give data that `qwen-moe data chat` made")
        self.prefix, self.kind, self.padding = prefix, kind, manifest.end_of_document_id
        self.per_example = 2 if kind == "pairs" else 1
        self.lengths = np.array(document_lengths(prefix), np.int64)
        if len(self.lengths) % self.per_example:
            raise UserError(f"{prefix} has {len(self.lengths)} documents, which are no pairs: prepare the data again")
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
            raise UserError(f"{prefix} has no example of at most {length:,} tokens: raise data.sequence_length")
        self.tokens = np.memmap(bin_path(prefix), mode="r", dtype=token_dtype(prefix))
        self.learn = np.memmap(column_path(prefix, LEARN), mode="r", dtype=np.uint8)
        if len(self.learn) != len(self.tokens):
            raise UserError(
                f"{column_path(prefix, LEARN)} has {len(self.learn):,} values for {len(self.tokens):,} tokens"
            )

        self.criteria, self.preferences = _preferences(prefix, manifest, len(self.sizes))

    def documents(self, example: int) -> range:
        return range(example * self.per_example, (example + 1) * self.per_example)

    def read(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a document, and the label of each: the token that follows it in the document, if it is learned."""
        at = slice(self.starts[document], self.starts[document] + self.lengths[document])
        ids = self.tokens[at].astype(np.int64)
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[:-1] = np.where(self.learn[at][1:], ids[1:], IGNORE)
        return ids, labels

    def judged(self, document: int, criteria: Sequence[str]) -> tuple[int, np.ndarray]:
        """Of an answer of a pair: the place of its last learned token, and by criterion 1 where it is the better answer, -1
        where the other is, 0 where that was not judged."""
        at = slice(self.starts[document], self.starts[document] + self.lengths[document])
        row = self.preferences[document // 2]
        values = [int(row[self.criteria.index(name)]) if name in self.criteria else 0 for name in criteria]
        return int(np.flatnonzero(self.learn[at])[-1]), np.array(values) * (1 if document % 2 == 0 else -1)


def _preferences(prefix: Path, manifest: PreparedData, pairs: int) -> tuple[list[str], np.ndarray]:
    """By which criteria pairs were judged, and the judgments ``[pairs, criteria]``. Data of earlier versions have none, and
    each chosen answer is then the better one."""
    if PREFERENCES not in manifest.columns:
        return [PREFERENCE], np.ones((pairs, 1), np.int8)
    names, path = sorted(manifest.criteria), column_path(prefix, PREFERENCES)
    if path.stat().st_size != pairs * len(names):
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, expected {len(names)} for each of {pairs:,} pairs: prepare the data "
            "again"
        )
    if not names:
        return [], np.zeros((pairs, 0), np.int8)
    return names, np.memmap(path, mode="r", dtype=np.int8, shape=(pairs, len(names)))


class _Rows:
    """The rows of one epoch after another."""

    def __init__(
        self, sets: Sequence[_OpenSet], shares: Sequence[Share], length: int, epochs: int, seed: int | None
    ) -> None:
        self.sets, self.length = sets, length
        self.first_examples = np.cumsum([0, *(len(one.sizes) for one in sets)])
        self.examples = self.tokens = 0
        self.criteria: tuple[str, ...] = ()  # of the judgments that batches hold
        self._epochs: list[tuple[np.ndarray, Packed]] = []
        for epoch in range(epochs):
            drawn = draws(shares, seed, epoch) if seed is not None else _in_order(sets)
            lengths = np.zeros(len(drawn), np.int64)
            for number, one in enumerate(sets):
                of_set = drawn[:, 0] == number
                drawn[of_set, 1] = one.kept[drawn[of_set, 1]]
                lengths[of_set] = one.sizes[drawn[of_set, 1]]
            self._epochs.append((drawn, pack(lengths, length, [seed, epoch, 0] if seed is not None else None)))
            self.examples, self.tokens = self.examples + len(lengths), self.tokens + int(lengths.sum())
        self.per_epoch = [len(packed) for _, packed in self._epochs]
        self._firsts = np.cumsum([0, *self.per_epoch])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def placed(self, row: int) -> tuple[Placed, ...]:
        """The documents of a row, without padding; rows past the last have none."""
        if row >= len(self):
            return ()
        epoch = int(np.searchsorted(self._firsts, row, "right")) - 1
        drawn, packed = self._epochs[epoch]
        found, start = [], 0
        for number, example in drawn[packed.row(row - self._firsts[epoch])].tolist():
            for document in self.sets[number].documents(example):
                length = int(self.sets[number].lengths[document])
                index = int(self.first_examples[number]) + example
                found.append(Placed(dataset=number, example=index, document=document, start=start, length=length))
                start += length
        return tuple(found)

    def batch(self, first: int, count: int) -> Batch:
        fields = {
            "input_ids": np.full((count, self.length), self.sets[0].padding),
            "labels": np.full((count, self.length), IGNORE),
            "document_starts": np.zeros((count, self.length), np.int64),
            "example_ids": np.full((count, self.length), -1),
        }
        if self.criteria:
            fields["preferences"] = np.zeros((count, self.length, len(self.criteria)), np.int64)
        for row in range(count):
            end = 0
            for one in self.placed(first + row):
                at, end = slice(one.start, one.start + one.length), one.start + one.length
                fields["input_ids"][row, at], fields["labels"][row, at] = self.sets[one.dataset].read(one.document)
                fields["document_starts"][row, at], fields["example_ids"][row, at] = one.start, one.example
                if self.criteria:
                    place, judged = self.sets[one.dataset].judged(one.document, self.criteria)
                    fields["preferences"][row, one.start + place] = judged
            fields["document_starts"][row, end:] = end
        fields["position_ids"] = np.arange(self.length) - fields["document_starts"]
        return {name: torch.from_numpy(values) for name, values in fields.items()}


def _in_order(sets: Sequence[_OpenSet]) -> np.ndarray:
    return np.concatenate([np.stack([np.full(len(s.kept), n), np.arange(len(s.kept))], 1) for n, s in enumerate(sets)])


class PackedExamples:
    """Rows of ``length`` tokens over ``epochs`` passes, and rows of validation examples in their order in the files.

    All ranks construct it together. A batch holds ``[b, length]``: ``input_ids``; ``labels`` (the next token of the
    document, IGNORE where it is not learned and at a document's end); ``document_starts`` and ``position_ids``; and
    ``example_ids``, which is -1 on padding. ``longer``: what to do with examples that do not fit into a row.
    Raises UserError if data are damaged, of different kinds, made with different tokenizers, or do not fit.
    """

    def __init__(
        self,
        sets: Sequence[ExampleSet],
        *,
        length: int,
        epochs: int,
        seed: int,
        vocab_size: int,
        cache: Path,
        longer: Longer = "error",
        validation: Sequence[Path] = (),
    ) -> None:
        prefixes = list(dict.fromkeys([*(one.prefix for one in sets), *validation]))
        contents = verified_on_all_ranks(prefixes, vocab_size, cache / "verified.json")
        check_tokenizers(None, [Dataset(prefix=prefix) for prefix in prefixes])
        opened = {prefix: _OpenSet(prefix, length, longer) for prefix in prefixes}
        kinds = {one.kind for one in opened.values()}
        if len(kinds) > 1:
            named = ", ".join(f"{prefix} ({one.kind})" for prefix, one in opened.items())
            raise UserError(f"the data are of different kinds: {named}; give conversations only, or pairs only")
        self.kind = kinds.pop()
        self.sets = [opened[one.prefix] for one in sets]
        self.rows = _Rows(self.sets, _shares(sets, self.sets), length, epochs, seed)
        self._validation = _Rows([opened[p] for p in validation], [], length, 1, None) if validation else None
        self.validation_samples = len(self._validation) if self._validation is not None else 0
        decides: list[Any] = [(contents[one.prefix].sha256, one.epochs, one.weight) for one in sets]
        decides += [length, seed, longer, ROWS_PER_WINDOW]
        self.fingerprint = hashlib.sha256(repr(decides).encode()).hexdigest()[:32]

    def judge_by(self, criteria: Sequence[str]) -> None:
        """Let batches hold ``preferences [b, length, C]``: by each of ``criteria``, at the last learned token of each answer
        of a pair, 1 where it is the better answer, -1 where the other is, and 0 where that was not judged and everywhere
        else. Raises UserError unless the data are pairs, some of which were judged by each."""
        if self.kind != "pairs":
            named = ", ".join(str(one.prefix) for one in self.sets)
            raise UserError(f"a reward model learns from pairs, and {named} holds conversations: give prepared pairs")
        known = sorted({name for one in self.sets for name in one.criteria})
        if missing := [name for name in criteria if name not in known]:
            raise UserError(
                f"no pair was judged by {', '.join(missing)}: objective.reward.criteria can name {', '.join(known)} with "
                'these data, or give pairs with "preferences"'
            )
        for rows in (self.rows, self._validation):
            if rows is not None:
                rows.criteria = tuple(criteria)

    def steps(self, global_batch_size: int) -> int:
        """Optimizer steps that read every row once. Rows of the last step that do not exist are padding."""
        return -(-len(self.rows) // global_batch_size)

    def facts(self) -> dict[str, Any]:
        """Figures for the record: ``examples`` counts those of all epochs, ``left_out`` those that do not fit into a row,
        and ``padding`` is the share of tokens that are padding."""
        rows = self.rows
        return {
            "kind": self.kind,
            "rows": len(rows),
            "rows_per_epoch": rows.per_epoch,
            "examples": rows.examples,
            "left_out": sum(one.left_out for one in self.sets),
            "padding": 1 - rows.tokens / max(1, len(rows) * rows.length),
        }

    def is_of_this_data(self, fingerprint: str, train_samples: int | None = None) -> bool:
        """Whether ``fingerprint`` is that of these rows. The order is the same whatever the number of epochs or samples."""
        return fingerprint == self.fingerprint

    def begins_as(self, train_samples: int, samples: int) -> bool:
        """Always true: the rows of an epoch do not depend on how many follow."""
        return True

    def placed(self, row: int) -> tuple[Placed, ...]:
        """The documents of a row, without its padding."""
        return self.rows.placed(row)

    def train_batch(self, first: int, count: int) -> Batch:
        """Rows ``first`` and following as one micro-batch; rows past the last are padding."""
        return self.rows.batch(first, count)

    def validation_batch(self, first: int, count: int) -> Batch:
        """Validation rows; rows past the last are padding."""
        assert self._validation is not None
        return self._validation.batch(first, count)


def _shares(sets: Sequence[ExampleSet], opened: Sequence[_OpenSet]) -> list[Share]:
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
