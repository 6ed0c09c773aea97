"""Documents of a corpus: text, JSONL, either compressed, directories of them, or the interpreter's own library."""

import gzip
import hashlib
import io
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from qwen_moe.errors import UserError

PYTHON_STDLIB = "python-stdlib"
BadUtf8 = Literal["error", "skip", "replace"]
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".py", ".text")
_JSONL_ENDINGS = (".jsonl", ".ndjson")
_PACKED_ENDINGS = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of the corpus. ``kind`` says how it is cut into documents."""

    path: Path
    kind: Literal["text", "jsonl", "python"]
    bytes: int


@dataclass
class ReadCounts:
    """What reading met so far; ``bytes`` are of the files as they lie on disk."""

    bytes: int = 0
    skipped: list[str] = field(default_factory=list)


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Every file behind ``inputs`` (paths of files and directories, or ``python-stdlib``), in a fixed order.

    Raises UserError for a path that does not exist, an ending that is not known, or when there is nothing to read.
    """
    sources: list[Source] = []
    for name in inputs:
        path = Path(name)
        if name == PYTHON_STDLIB:
            sources.extend(_standard_library())
        elif path.is_dir():
            found = [_source(file) for file in sorted(path.rglob("*")) if file.is_file() and _kind(file)]
            if not found:
                raise UserError(
                    f"{path} holds no text: expected files ending in {_endings()} (or these with .gz, .zst)"
                )
            sources.extend(found)
        elif path.is_file():
            sources.append(_source(path))
        else:
            raise UserError(f"input {name} does not exist: give files, directories or {PYTHON_STDLIB!r}")
    if sum(source.bytes for source in sources) == 0:
        raise UserError(f"the corpus is empty: {', '.join(inputs)} hold no byte of text")
    return sources


def _endings() -> str:
    return " ".join(_TEXT_ENDINGS + _JSONL_ENDINGS)


def _kind(path: Path) -> Literal["text", "jsonl"] | None:
    name = path.name.lower()
    for ending in _PACKED_ENDINGS:
        name = name.removesuffix(ending)
    if name.endswith(_JSONL_ENDINGS):
        return "jsonl"
    return "text" if name.endswith(_TEXT_ENDINGS) else None


def _source(path: Path) -> Source:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path}: the ending is not known; expected one of {_endings()} (or these with .gz, .zst)")
    return Source(path=path, kind=kind, bytes=path.stat().st_size)


def _standard_library() -> list[Source]:
    """Every .py file of the running interpreter's library, without installed packages, in an order shuffled by a hash
    of the path, so that a validation tail is not all from the end of the alphabet."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts) and path.is_file():
            files.append((hashlib.sha256(relative.as_posix().encode()).digest(), path))
    if not files:
        raise UserError(f"{root} holds no .py file: this interpreter ships its library compiled; give another input")
    return [Source(path=path, kind="python", bytes=path.stat().st_size) for _, path in sorted(files)]


def read_documents(
    source: Source, counts: ReadCounts, text_key: str = "text", on_bad_utf8: BadUtf8 = "error"
) -> Iterator[str]:
    """The documents of one file, empty ones left out. Raises UserError naming file and place of what is unreadable."""
    start = counts.bytes
    if source.kind == "jsonl":
        yield from _read_jsonl(source.path, counts, text_key, on_bad_utf8)
    else:
        text = _read_python(source.path) if source.kind == "python" else None
        if source.kind == "text":
            text = _decode(_read_all(source.path), str(source.path), 0, on_bad_utf8)
        if text is None:
            counts.skipped.append(str(source.path))
        elif text.strip():
            yield text
    counts.bytes = start + source.bytes


def _read_python(path: Path) -> str | None:
    """A source file decoded as PEP 263 says; None for the few that are not decodable on purpose (tests of the parser)."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def _open(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be unpacked ({error}): the file is damaged or cut off; fetch it again")


def _read_all(path: Path) -> bytes:
    import zstandard

    with path.open("rb") as raw:
        try:
            return _open(path, raw).read()
        except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise _damaged(path, error) from None


def _decode(content: bytes, where: str, offset: int, on_bad_utf8: BadUtf8) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if on_bad_utf8 == "skip":
            return None
        if on_bad_utf8 == "replace":
            return content.decode("utf-8", errors="replace")
        raise UserError(
            f"{where}: byte {offset + error.start} (0x{content[error.start]:02x}) is not UTF-8; convert the file, or "
            "use --on-bad-utf8 skip or replace"
        ) from None


def _read_jsonl(path: Path, counts: ReadCounts, text_key: str, on_bad_utf8: BadUtf8) -> Iterator[str]:
    import zstandard

    start = counts.bytes
    with path.open("rb") as raw:
        number = offset = 0
        file = _open(path, raw)
        while True:
            try:
                line = file.readline()
            except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
                raise _damaged(path, error) from None
            if not line:
                return
            number += 1
            where = f"{path}, line {number}"
            text = _decode(line, where, offset, on_bad_utf8)
            offset += len(line)
            counts.bytes = start + raw.tell()
            if text is None:
                counts.skipped.append(where)
            elif text.strip():
                document = _document_of_line(text, where, text_key)
                if document.strip():
                    yield document


def _document_of_line(line: str, where: str, text_key: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): each line must be an object with the text") from None
    if not isinstance(value, dict) or text_key not in value:
        keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where} has no {text_key!r} (found: {keys}); name the key with --text-key")
    if not isinstance(value[text_key], str):
        raise UserError(f"{where}: {text_key!r} is {type(value[text_key]).__name__}, expected text")
    return value[text_key]
