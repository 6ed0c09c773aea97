"""Reads the documents of a corpus's files, and names file and line of what cannot be read."""

import functools
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from qwen_moe.data.packed import HashedFile, open_packed
from qwen_moe.data.parquet import NotUtf8, parquet_rows, row_count
from qwen_moe.data.passkey import SEPARATOR
from qwen_moe.data.sources import Source, Tally
from qwen_moe.documents import once
from qwen_moe.errors import UserError

BadUtf8 = Literal["error", "skip", "replace"]
BadLine = Literal["error", "skip"]
# Memory holds several copies of a document's token ids.
LONGEST_DOCUMENT = 1 << 30
BAD_LINE = "malformed lines"
BAD_TEXT = "not decodable"
EMPTY = "empty"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are read from files. ``text_key``: the key of JSON lines, or the column of Parquet, that holds the text.
    ``on_bad_utf8`` says what to do with text that is not Unicode, and ``on_bad_line`` what to do with a JSONL line that is
    not an object with text under the key, or a row of Parquet without text."""

    text_key: str = "text"
    on_bad_utf8: BadUtf8 = "error"
    on_bad_line: BadLine = "error"


@dataclass
class ReadCounts:
    """Counts of what was read so far. ``bytes`` counts the files' bytes on disk; ``digests`` holds the SHA-256 of each file
    that was read to its end."""

    bytes: int = 0
    left_out: Tally = field(default_factory=Tally)
    digests: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Number of documents that were left out although they were not empty."""
        return sum(count for reason, count in self.left_out.counts.items() if reason != EMPTY)


class _BadLine(UserError):
    """A line that ``on_bad_line: skip`` leaves out."""


class _NotUnicode(UserError):
    """A text that ``on_bad_utf8: skip`` leaves out."""


def read_documents(source: Source, counts: ReadCounts, reading: Reading | None = None) -> Iterator[str]:
    """The documents of one file, without empty ones. Raises UserError, which names file and position of unreadable text."""
    reading = reading or Reading()
    for _, row in read_rows(source, counts, reading):
        yield row[reading.text_key]


def read_rows(source: Source, counts: ReadCounts, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Like `read_documents`: the place of each, and its line's object or, of other files, an object with its text."""
    start = counts.bytes
    if source.kind == "parquet":
        for share, where, get in _of_parquet(source, reading):
            row = _row(source, where, get, counts, reading)
            counts.bytes = start + int(source.bytes * share)
            if row is not None:
                yield where, row
        counts.digests.append(source.sha256())
    else:
        with source.open() as raw:
            hashed = HashedFile(raw)
            file = open_packed(source.path, io.BufferedReader(hashed, 1 << 18))
            found = _of_lines(file, source.path, reading) if source.has_lines else _of_file(file, source, reading)
            for where, get in found:
                row = _row(source, where, get, counts, reading)
                counts.bytes = start + hashed.taken
                if row is not None:
                    yield where, row
            counts.digests.append(hashed.digest.hexdigest())
    counts.bytes = start + source.bytes


def _row(
    source: Source, where: str, get: Callable[[], dict[str, Any]], counts: ReadCounts, reading: Reading
) -> dict[str, Any] | None:
    """What ``get`` returns; None if it is left out, which is counted."""
    try:
        row = get()
    except _BadLine:
        if reading.on_bad_line == "error":
            raise
        counts.left_out.add(BAD_LINE, where)
        return None
    except _NotUnicode:
        if source.kind != "python" and reading.on_bad_utf8 != "skip":
            raise
        counts.left_out.add(BAD_TEXT, where)
        return None
    if not row[reading.text_key].strip():
        counts.left_out.add(EMPTY, where)
        return None
    return row


class _Text:
    """Bytes that are decoded later, so that reading can continue after bad ones."""

    def __init__(self, content: bytes, where: str, offset: int, reading: Reading) -> None:
        self.content, self.where, self.offset, self.reading = content, where, offset, reading

    def document(self) -> dict[str, Any]:
        """The whole as one document."""
        if len(self.content) > LONGEST_DOCUMENT:
            raise UserError(
                f"{self.where} is a document of more than {LONGEST_DOCUMENT:,} bytes: split it into several"
            )
        return {self.reading.text_key: self._decode()}

    def python(self) -> dict[str, Any]:
        """Decode as PEP 263 says. A few files of the standard library are undecodable on purpose: they are not Unicode."""
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(self.content).readline)
            return {self.reading.text_key: io.TextIOWrapper(io.BytesIO(self.content), encoding).read()}
        except (SyntaxError, UnicodeDecodeError) as error:
            raise _NotUnicode(f"{self.where} is not decodable ({error})") from None

    def line(self) -> dict[str, Any]:
        """The object of a line of JSONL, which has a text."""
        if len(self.content) > LONGEST_DOCUMENT:
            raise _BadLine(
                f"{self.where} has more than {LONGEST_DOCUMENT:,} bytes: JSONL has one object per line; split it, or leave "
                "it out with --on-bad-line skip"
            )
        line = self._decode()
        key, where = self.reading.text_key, self.where
        advice = "use --on-bad-line skip to leave such lines out"
        try:
            value = json.loads(line, object_pairs_hook=once)
        except RecursionError:
            raise _BadLine(f"{where} is nested too deeply for an object with text; {advice}") from None
        except ValueError as error:
            raise _BadLine(
                f"{where} is not JSON ({error}): each line must be an object with the text; {advice}"
            ) from None
        if not isinstance(value, dict) or key not in value:
            keys = ", ".join(list(value)[:20]) if isinstance(value, dict) else type(value).__name__
            raise _BadLine(f"{where} has no {key!r} (found: {keys}); name the key with --text-key, or {advice}")
        if not isinstance(value[key], str):
            raise _BadLine(f"{where}: {key!r} is {type(value[key]).__name__}, expected text; {advice}")
        return value | {key: self._unicode(value[key])}

    def row(self, others: dict[str, Any]) -> dict[str, Any]:
        """A row of Parquet, whose other columns are ``others``."""
        return others | {self.reading.text_key: self._decode()}

    def _decode(self) -> str:
        policy = self.reading.on_bad_utf8
        try:
            text = self.content.decode("utf-8")
            # Text has no NUL bytes. They come from UTF-16, a binary file, or a file that was not written completely.
            if "\0" not in text:
                return text
            start, what = self.content.index(0), "(0x00) is a NUL, which no text has"
        except UnicodeDecodeError as error:
            start, what = error.start, f"(0x{self.content[error.start]:02x}) is not UTF-8"
        if policy == "replace":
            return self.content.decode("utf-8", errors="replace").replace("\0", "\ufffd")
        raise _NotUnicode(
            f"{self.where}: byte {self.offset + start} {what}; convert the file, or use --on-bad-utf8 skip or replace"
        )

    def _unicode(self, text: str) -> str:
        """Check ``text`` for what JSON can spell and no text has: halves of surrogate pairs, and NUL."""
        if "\0" not in text and (text.isascii() or not _NO_CHARACTER.search(text)):
            return text
        if self.reading.on_bad_utf8 == "replace":
            return _NO_CHARACTER.sub("\ufffd", text)
        found = _NO_CHARACTER.findall(text)[0]
        what = "a NUL, which no text has" if found == "\0" else "half of a surrogate pair, which is not a character"
        raise _NotUnicode(
            f"{self.where}: \\u{ord(found):04x} is {what}; fix the line, or use --on-bad-utf8 skip or replace"
        )


Found = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def _of_file(file: IO[bytes], source: Source, reading: Reading) -> Found:
    where = str(source.path)
    if source.kind == "passkey":
        for number, text in enumerate(file.read().decode().split(SEPARATOR), 1):
            yield f"{where}, document {number}", functools.partial(dict, {reading.text_key: text})
        return
    # Read one byte more than is allowed, to detect a document that is too long.
    content = file.read(LONGEST_DOCUMENT + 1) if source.kind == "text" else file.read()
    if source.kind == "python":
        yield where, _Text(content, where, 0, reading).python
    else:
        offset = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
        yield where, _Text(content[offset:], where, offset, reading).document


def _of_lines(file: IO[bytes], path: Path, reading: Reading) -> Found:
    for where, offset, content in _lines(file, path):
        yield where, _Text(content, where, offset, reading).line


def _of_parquet(source: Source, reading: Reading) -> Iterator[tuple[float, str, Callable[[], dict[str, Any]]]]:
    """(share of the file up to the row, its place, what gives the row) of every row."""
    rows = row_count(source.path)
    for number, values in parquet_rows(source.path):
        where = f"{source.path}, row {number}"
        yield number / rows, where, functools.partial(_parquet_row, values, where, reading)


def _parquet_row(values: dict[str, Any], where: str, reading: Reading) -> dict[str, Any]:
    key = reading.text_key
    text = values.pop(key, None)
    if not isinstance(text, str | NotUtf8):
        what = "no text" if text is None else f"{type(text).__name__}, expected text"
        raise _BadLine(
            f"{where}: column {key!r} has {what}; name the column with --text-key, or use --on-bad-line skip to leave such "
            "rows out"
        )
    content = text if isinstance(text, NotUtf8) else text.encode()
    return _Text(content, where, 0, reading).row(json.loads(json.dumps(values, default=str)))


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(place, offset in bytes, content) of every line that is not blank. Of a line that is too long, the content is cut to
    one byte more than is allowed."""
    number = offset = 0
    while line := file.readline(LONGEST_DOCUMENT + 1):
        number += 1
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            yield f"{path}, line {number}", offset + len(line) - len(content), content
        offset += len(line)
        while len(line) > LONGEST_DOCUMENT and not line.endswith(b"\n") and (rest := file.readline(1 << 24)):
            offset += len(rest)
            if rest.endswith(b"\n"):
                break


def read_lines(source: Source, counts: ReadCounts) -> Iterator[tuple[str, bytes]]:
    """(place, content) of every line of a JSONL file that is not blank."""
    start = counts.bytes
    with source.open() as raw:
        hashed = HashedFile(raw)
        for where, _, content in _lines(open_packed(source.path, io.BufferedReader(hashed, 1 << 18)), source.path):
            counts.bytes = start + hashed.taken
            yield where, content
        counts.digests.append(hashed.digest.hexdigest())
    counts.bytes = start + source.bytes
