"""Rows of documents, conversations, pairs, queries and tests: which files, which lines, and what text a row has."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_moe.curation.scores.documents import json_line
from qwen_moe.data.corpus import LONGEST_DOCUMENT, ReadCounts, Reading, read_documents, read_lines
from qwen_moe.data.parquet import NotUtf8, parquet_rows
from qwen_moe.data.sources import Corpus, Source, find_corpus
from qwen_moe.documents import once
from qwen_moe.errors import UserError
from qwen_moe.packages import check_installed

# Keys of chat data (docs/data.md) and queries (docs/rollouts.md), in the order in which their texts are joined.
_CHAT = ("messages", "prompt", "completion", "chosen", "rejected")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ADVICE = "correct it, or use --on-bad-line skip to leave such rows out"
_SHOWN_KEYS = 20


class BadLine(UserError):
    """A row that ``on_bad_line: skip`` leaves out."""


@dataclass(frozen=True)
class Line:
    """A row before it is read: JSON, from ``line`` of ``file``. Lines, rows of Parquet and documents of a file count from 1;
    a file that is one document has line 0. ``problem``: why there is nothing to read."""

    file: str
    line: int
    content: bytes
    problem: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else self.file


def find_rows(inputs: Sequence[str]) -> Corpus:
    """The files behind ``inputs``, Parquet among them. Raises UserError."""
    corpus = find_corpus(inputs, parquet=True)
    if parquet := next((source for source in corpus.sources if source.kind == "parquet"), None):
        check_installed(f"{parquet.path} is Parquet", "pyarrow", otherwise="convert it to JSONL")
    return corpus


def read_rows(source: Source, text_key: str, skip_bad: bool, keys: Sequence[str] = ()) -> Iterator[Line]:
    """Every row of a file. Text of a file that is not JSONL becomes a row with ``text_key``, ``id`` and the file's name.
    ``keys``: further keys that may hold text."""
    name = str(source.path)
    if source.has_lines:
        for number, (where, content) in enumerate(read_lines(source, ReadCounts()), 1):
            found = re.search(r", line (\d+)$", where)
            yield Line(name, int(found[1]) if found else number, content)
    elif source.kind == "parquet":
        yield from _parquet_rows(source.path, (text_key, *_CHAT, *keys))
    else:
        counts = ReadCounts()
        reading = Reading(on_bad_utf8="skip" if skip_bad else "error")
        several = source.kind == "passkey"
        for number, text in enumerate(read_documents(source, counts, reading), 1):
            row = {text_key: text, "id": f"{name}/{number}" if several else name, "metadata": {"file_path": name}}
            yield Line(name, number if several else 0, json_line(row))
        if counts.skipped:
            yield Line(name, 0, b"", problem=f"{name} is not text")


def _parquet_rows(path: Path, texts: Sequence[str]) -> Iterator[Line]:
    """The rows of a Parquet file, with all of its columns, those of ``texts`` as text."""
    for number, row in parquet_rows(path):
        if broken := [name for name, value in row.items() if isinstance(value, NotUtf8)]:
            yield Line(str(path), number, b"", problem=f"{path}, row {number}: column {broken[0]!r} is not UTF-8")
        elif binary := [name for name in texts if isinstance(row.get(name), bytes)]:
            what = f"column {binary[0]!r} holds bytes, expected text"
            yield Line(str(path), number, b"", problem=f"{path}, row {number}: {what}")
        else:
            yield Line(str(path), number, json.dumps(row, ensure_ascii=False, default=str).encode())


def row_of(line: Line) -> dict[str, Any]:
    """The object of a row. Raises BadLine, which names file and line."""
    advice = _ADVICE
    if line.problem:
        raise BadLine(f"{line.problem}; {advice}")
    if len(line.content) > LONGEST_DOCUMENT:
        raise BadLine(f"{line.where} has more than {LONGEST_DOCUMENT:,} bytes: JSONL has one object per line; {advice}")
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line.content[error.start]
        raise BadLine(
            f"{line.where}: byte {error.start} of the line (0x{byte:02x}) is not UTF-8; convert the file, or use "
            "--on-bad-line skip to leave such rows out"
        ) from None
    if "\0" in text:
        raise BadLine(f"{line.where} has a NUL byte, which no text has; {advice}")
    try:
        row = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise BadLine(f"{line.where} is nested too deeply; {advice}") from None
    except ValueError as error:
        raise BadLine(f"{line.where} is not JSON ({error}); {advice}") from None
    if not isinstance(row, dict):
        raise BadLine(f"{line.where} is of type {type(row).__name__}, expected an object; {advice}")
    return row


def text_of(row: dict[str, Any], line: Line, text_key: str = "text", keys: Sequence[str] = ()) -> str:
    """The text of a row: that under ``keys``, or under ``text_key``, or of all its messages (of a pair: the prompt and both
    answers; of a query: the prompt). Raises BadLine if it has none."""
    if keys:
        if lacking := [key for key in keys if key not in row]:
            raise BadLine(
                _no_text(row, line, f"no {' and no '.join(map(repr, lacking))}; name the keys with --test-key")
            )
        parts = [part for key in keys for part in _parts(row[key])]
    elif text_key in row:
        if not isinstance(row[text_key], str):
            raise BadLine(
                f"{line.where}: {text_key!r} is {type(row[text_key]).__name__}, expected text; correct it, or use "
                "--on-bad-line skip to leave such rows out"
            )
        parts = [row[text_key]]
    else:
        chat = [key for key in _CHAT if key in row]
        if not chat:
            raise BadLine(
                _no_text(
                    row,
                    line,
                    f"neither {text_key!r} nor messages or a prompt; name the key of the text"
                    " with --text-key, of a test with --test-key",
                )
            )
        parts = [part for key in chat for part in _parts(row[key])]
    text = "\n".join(parts)
    if "\0" in text:
        raise BadLine(f"{line.where} has a NUL (\\u0000), which no text has; {_ADVICE}")
    if not text.isascii() and _SURROGATE.search(text):
        raise BadLine(
            f"{line.where} has half of a surrogate pair, which is not a character; correct it, or use --on-bad-line skip to "
            "leave such rows out"
        )
    return text


def _no_text(row: dict[str, Any], line: Line, what: str) -> str:
    found = ", ".join(list(row)[:_SHOWN_KEYS]) or "nothing"
    return f"{line.where} has {what} (found: {found}), or use --on-bad-line skip to leave such rows out"


def _parts(value: Any) -> Iterator[str]:
    """The texts in a value: of messages what they say, with the arguments of their calls, and not their roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, list):
        for one in value:
            yield from _parts(one)
    elif isinstance(value, dict):
        skipped = ("role", "type", "id", "name") if "role" in value or "function" in value or "type" in value else ()
        for key, one in value.items():
            if key not in skipped:
                yield from _parts(one)
