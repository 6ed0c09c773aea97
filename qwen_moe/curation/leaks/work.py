"""Batches of rows, and what worker processes make of them: lines that are kept, lines that are dropped, and counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_moe.curation.leaks.finder import Finder
from qwen_moe.curation.leaks.index import Seeds
from qwen_moe.curation.leaks.rows import BadLine, Line, read_rows, row_of, text_of
from qwen_moe.curation.leaks.sequences import Sequences
from qwen_moe.curation.leaks.settings import LeakSettings
from qwen_moe.curation.leaks.tokens import tokens_of
from qwen_moe.curation.scores.documents import json_line
from qwen_moe.data.sources import Source

REASON = "leak"
_BATCH_BYTES = 1_000_000
Position = tuple[int, int]  # how many files are read, and how many rows of the next one


@dataclass(frozen=True)
class Batch:
    """Rows that are read together. ``end``: where the rows after them begin."""

    lines: list[Line]
    size: int
    end: Position


@dataclass
class Outcome:
    """What became of a batch. ``best``: for each dropped row, the test that it has most in common with; ``matched``: all
    tests that it matches. ``by_chance``: rows that only the literal rule drops."""

    end: Position
    size: int
    rows: int = 0
    kept: bytes = b""
    dropped: bytes = b""
    best: list[int] = field(default_factory=list)
    matched: list[int] = field(default_factory=list)
    by_chance: int = 0
    bad: list[str] = field(default_factory=list)


def batches(sources: Sequence[Source], start: Position, settings: LeakSettings) -> Iterator[Batch]:
    """The rows from ``start`` on. They depend on nothing but the files and ``start``."""
    lines: list[Line] = []
    size = 0
    for number in range(start[0], len(sources)):
        skipped = start[1] if number == start[0] else 0
        rows = read_rows(sources[number], settings.text_key, settings.on_bad_line == "skip")
        for count, line in enumerate(rows, 1):
            if count <= skipped:
                continue
            lines.append(line)
            size += len(line.content)
            if size > _BATCH_BYTES:
                yield Batch(lines, size, (number, count))
                lines, size = [], 0
    if lines:
        yield Batch(lines, size, (len(sources), 0))


@dataclass(frozen=True)
class Given:
    """What a worker process begins with."""

    settings: LeakSettings
    sequences: Sequences


_settings: LeakSettings | None = None
_finders: list[Finder] = []


def make_finder(settings: LeakSettings, sequences: Sequences) -> Finder:
    return Finder(sequences, tokens_of(settings.tokenizer), Seeds(settings.seeds), settings.rule)


def start_worker(given: Given) -> None:
    """Build the index. With the literal rule, the windowed one judges its leaks once more."""
    global _settings
    _settings = given.settings
    _finders[:] = [make_finder(given.settings, given.sequences)]
    if given.settings.rule == "report":
        _finders.append(make_finder(given.settings.model_copy(update={"rule": "windowed"}), given.sequences))


def examine(batch: Batch) -> Outcome:
    """Judge the rows of a batch. Raises BadLine for a row that cannot be read, unless such rows are left out."""
    assert _settings is not None
    outcome = Outcome(batch.end, batch.size)
    kept, dropped = [], []
    for line in batch.lines:
        outcome.rows += 1
        try:
            row = row_of(line)
            text = text_of(row, line, _settings.text_key)
        except BadLine:
            if _settings.on_bad_line == "error":
                raise
            outcome.bad.append(line.where)
            continue
        leak, matched = _finders[0].leak(text)
        if leak is None:
            kept.append(line.content.rstrip(b"\r\n"))
            continue
        if len(_finders) > 1:
            leak["windowed"] = _finders[1].leak(text)[0] is not None
            outcome.by_chance += not leak["windowed"]
        outcome.best.append(matched[0])
        outcome.matched += matched
        dropped.append(_dropped(row, line, leak))
    outcome.kept, outcome.dropped = (b"".join(one + b"\n" for one in lines) for lines in (kept, dropped))
    return outcome


def _dropped(row: dict[str, Any], line: Line, leak: dict[str, Any]) -> bytes:
    """The row with the reason why it was dropped."""
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {} if metadata is None else {"metadata": metadata}
    about = {"filter_reason": REASON, "leak": {"file": line.file, "line": line.line} | leak}
    return json_line(row | {"metadata": metadata | about}).rstrip(b"\n")
