"""Micro-batches of whole conversations or pairs, packed into rows (`qwen_moe.data.rows`)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.sequence import Batch
from qwen_moe.config import Dataset
from qwen_moe.data.made_with import check_tokenizers
from qwen_moe.data.packing import ROWS_PER_WINDOW
from qwen_moe.data.ranks import verified_on_all_ranks
from qwen_moe.data.rows import ExampleSet, OpenSet, Order, Placed, Rows, open_sets, training_rows
from qwen_moe.data.samples import IGNORE
from qwen_moe.errors import UserError


class PackedExamples:
    """Rows of ``length`` tokens for training, as ``rows`` says, and rows of validation examples in their order in the files.

    All ranks construct it together. A batch holds ``[b, length]``: ``input_ids``; ``labels`` (the next token of the
    document, IGNORE where it is not learned and at a document's end); ``document_starts`` and ``position_ids``;
    ``counted``, false for padding; the sets' columns; and judgments of pairs if `judge_by` asks for them. Raises UserError
    if data are damaged, of different kinds, made with different tokenizers, or do not fit.
    """

    def __init__(
        self,
        sets: Sequence[ExampleSet],
        order: Order,
        *,
        vocab_size: int,
        cache: Path,
        validation: Sequence[Path] = (),
    ) -> None:
        prefixes = list(dict.fromkeys([*(one.prefix for one in sets), *validation]))
        contents = verified_on_all_ranks(prefixes, vocab_size, cache / "verified.json")
        check_tokenizers(None, [Dataset(prefix=prefix) for prefix in prefixes])
        self.opened = open_sets(sets, validation, order)
        self.rows = training_rows(sets, self.opened, order)
        self.sets, self.kind = self.rows.sets, self.rows.sets[0].kind
        self.validation_rows = None
        if validation:
            self.validation_rows = Rows([self.opened[p] for p in validation], [], Order(length=order.length))
        self.validation_samples = 0 if self.validation_rows is None else len(self.validation_rows)
        decides: list[Any] = [(contents[one.prefix].sha256, one.epochs, one.weight) for one in sets]
        decides += [order.length, order.seed, order.longer, ROWS_PER_WINDOW]
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
            named = f"objective.reward.criteria can name {', '.join(known)} with these data, or " if known else ""
            raise UserError(f'no pair was judged by {", ".join(missing)}: {named}give pairs with "preferences"')
        for rows in (self.rows, self.validation_rows):
            if rows is not None:
                rows.criteria = tuple(criteria)

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
        return _batch(self.rows, first, count)

    def validation_batch(self, first: int, count: int) -> Batch:
        """Validation rows; rows past the last are padding."""
        assert self.validation_rows is not None
        return _batch(self.validation_rows, first, count)


def _document(one: OpenSet, document: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a document, and the label of each: the token that follows it in the document, if it is learned."""
    at = one.at(document)
    ids = one.tokens[at].astype(np.int64)
    labels = np.full(len(ids), IGNORE, np.int64)
    labels[:-1] = np.where(one.learn[at][1:], ids[1:], IGNORE)
    return ids, labels


def _batch(rows: Rows, first: int, count: int) -> Batch:
    shape = (count, rows.length)
    columns = {name: values.dtype for name, values in rows.sets[0].columns.items()}
    fields = {
        "input_ids": np.full(shape, rows.sets[0].padding),
        "labels": np.full(shape, IGNORE),
        "document_starts": np.zeros(shape, np.int64),
        "counted": np.zeros(shape, bool),
    } | {name: np.zeros(shape, dtype) for name, dtype in columns.items()}
    if rows.criteria:
        fields["preferences"] = np.zeros((*shape, len(rows.criteria)), np.int64)
    for row in range(count):
        end = 0
        for one in rows.placed(first + row):
            at, end, of = slice(one.start, one.start + one.length), one.start + one.length, rows.sets[one.dataset]
            fields["input_ids"][row, at], fields["labels"][row, at] = _document(of, one.document)
            fields["document_starts"][row, at] = one.start
            for name in columns:
                fields[name][row, at] = of.columns[name][of.at(one.document)]
            if rows.criteria:
                place, judged = of.judged(one.document, rows.criteria)
                fields["preferences"][row, one.start + place] = judged
        fields["counted"][row, :end] = True
        fields["document_starts"][row, end:] = end
    fields["position_ids"] = np.arange(rows.length) - fields["document_starts"]
    return {name: torch.from_numpy(values) for name, values in fields.items()}
