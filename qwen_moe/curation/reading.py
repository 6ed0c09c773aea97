"""Reads the inputs of a recipe, JSON lines, Parquet and text, as documents that are named by file and line."""

import functools
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launchers.folder.atomic import write_json
from qwen_moe.curation.library import BaseReader, Document
from qwen_moe.curation.machine_text import ITEMS
from qwen_moe.curation.recipe import InputSection, check_domain
from qwen_moe.curation.scores.annotate import problem_of_scores
from qwen_moe.data.corpus import ReadCounts, Reading, read_documents, read_lines
from qwen_moe.data.packed import check_unpackers
from qwen_moe.data.parquet import NotUtf8, check_column, parquet_rows
from qwen_moe.data.sources import PYTHON_STDLIB, Source, find_corpus
from qwen_moe.documents import once
from qwen_moe.errors import UserError

BAD = "bad"  # the folder with what could not be read
SHOWN = 5  # of it, in one message
_PARQUET = (".parquet", ".pq")
# Metadata of dropped documents, and marks of the library while it works: what an input has under these names gets another.
_TAKEN = ("id", "filter", "filter_reason", "leak", "duplicate_count", "minhash_cluster_id", "minhash_cluster_size")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Place:
    """A file of an input, or texts of the machine. ``name``: the beginning of its documents' ids. ``divided``: whether all
    tasks share it, document by document; otherwise one task reads it."""

    name: str
    kind: Literal["lines", "file", "parquet", "machine"]
    of: InputSection
    source: Source | None = None
    divided: bool = False
    status: str = ""  # tells without reading it whether it has changed

    @property
    def path(self) -> Path:
        assert self.source is not None
        return self.source.path


def find_places(inputs: Sequence[InputSection], tasks: int) -> list[Place]:
    """The files of all inputs in a fixed order. A file of more than a task's share is divided. Raises UserError for inputs
    that do not exist or hold no text, for Parquet files without the column, and for names that are not UTF-8."""
    found: list[Place] = []
    for one in inputs:
        found += _places(one)
    for place in found:
        if not place.name.isascii() and _SURROGATE.search(place.name):
            raise UserError(
                f"the name of {place.name!r} is not UTF-8, and documents are named by their file: rename it"
            )
    check_unpackers(place.path for place in found if place.kind in ("lines", "file"))
    share = sum(place.source.bytes for place in found if place.source is not None) / tasks
    return [
        Place(
            name=place.name,
            kind=place.kind,
            of=place.of,
            source=place.source,
            divided=place.kind == "machine"
            or (place.kind != "file" and place.source is not None and place.source.bytes > share),
            status=place.status,
        )
        for place in found
    ]


def _places(one: InputSection) -> list[Place]:
    if one.path in ITEMS:
        return [Place(name=one.path, kind="machine", of=one, status=_machine())]
    path = Path(one.path)
    parquet = [path] if path.name.lower().endswith(_PARQUET) else _parquet_in(path)
    found = [_parquet(file, one) for file in parquet]
    if path in parquet:
        return found
    try:
        sources = find_corpus([one.path]).sources
    except UserError:
        if not found:
            raise
        return found
    root = Path(sysconfig.get_path("stdlib"))
    for source in sources:
        if source.kind == "passkey":
            raise UserError(f"input {one.path}: these documents are made for a test of long context: leave them out")
        name = str(source.path)
        if source.kind == "python":  # the same id wherever the interpreter is installed
            name = f"{PYTHON_STDLIB}/{source.path.relative_to(root).as_posix()}"
        found.append(
            Place(
                name=name,
                kind="lines" if source.has_lines else "file",
                of=one,
                source=source,
                status=source.status(),
            )
        )
    return found


def _machine() -> str:
    """What the texts of the machine depend on: the interpreter and its packages."""
    return hashlib.sha256("\n".join(name for name, _ in ITEMS["python-packages"]()).encode()).hexdigest()


def _parquet_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (path for path in folder.rglob("*") if path.name.lower().endswith(_PARQUET) and path.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _parquet(path: Path, one: InputSection) -> Place:
    if not path.is_file():
        raise UserError(f"input {path} does not exist: give files, folders, {PYTHON_STDLIB}, {' or '.join(ITEMS)}")
    check_column(path, one.text_key, "text_key")
    source = Source(path=path, kind="text", bytes=path.stat().st_size)
    return Place(name=str(path), kind="parquet", of=one, source=source, status=source.status())


class BadInput(Exception):
    """What is wrong with a line, a row or a file."""


@dataclass
class Problems:
    """What could not be read: how much, and the first of it: (number of the file, number in the file, what is wrong)."""

    count: int = 0
    first: list[tuple[int, int, str]] = field(default_factory=list)
    empty: int = 0

    def add(self, file: int, index: int, problem: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((file, index, problem))


class Inputs(BaseReader):
    """Reads a task's share of ``places``. What cannot be read is counted in ``folder``/bad and left out; with
    ``check_domains``, also a document whose domain is none."""

    name = "inputs"

    def __init__(self, places: Sequence[Place], folder: Path, check_domains: bool = False) -> None:
        super().__init__()
        self.places, self.folder, self.check_domains = list(places), str(folder), check_domains

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        problems = Problems()
        for number, place in enumerate(self.places):
            if not place.divided and number % world_size != rank:
                continue
            for index, (file, line, get) in enumerate(_documents(place)):
                if place.divided and index % world_size != rank:
                    continue
                try:
                    text, metadata = get()
                    if self.check_domains:
                        _check_domain(metadata)
                except BadInput as error:
                    problems.add(number, index, f"{file}, {_unit(place)} {line}: {error}" if line else f"{error}")
                    continue
                if not text.strip():
                    problems.empty += 1
                    continue
                # Documents of an earlier curation, or of `data score`, keep what is known of them.
                if "file_path" not in metadata:
                    metadata |= {"file_path": file} | ({"line": line} if line else {})
                metadata["domain"] = metadata.get("domain") or place.of.domain
                yield Document(text=text, id=f"{file}:{line}" if line else file, metadata=metadata)
        write_json(Path(self.folder) / BAD / f"{rank:05d}.json", vars(problems))


def _check_domain(metadata: dict[str, Any]) -> None:
    if not (name := metadata.get("domain")):
        return
    try:
        check_domain(str(name))
    except ValueError as error:
        raise BadInput(f"its key domain, which counts before the input's: {error}") from None


def _unit(place: Place) -> str:
    return "row" if place.kind == "parquet" else "line"


def _documents(place: Place) -> Iterator[tuple[str, int, Any]]:
    """(file, line, what gives text and metadata or raises BadInput) of each document; a file that is one has line 0."""
    if place.kind == "machine":
        for name, read in ITEMS[place.name]():
            yield f"{place.name}/{name}", 0, lambda read=read: (read(), {})
    elif place.kind == "parquet":
        yield from _rows(place)
    elif place.kind == "lines":
        assert place.source is not None
        for where, content in read_lines(place.source, ReadCounts()):
            line = int(where.rsplit(" ", 1)[1])
            yield place.name, line, lambda content=content: _line(content, place.of.text_key)
    else:
        yield place.name, 0, lambda: _whole(place)


def _whole(place: Place) -> tuple[str, dict[str, Any]]:
    assert place.source is not None
    reading = Reading(on_bad_utf8="error")
    counts = ReadCounts()
    try:
        texts = list(read_documents(place.source, counts, reading))
    except UserError as error:
        raise BadInput(str(error).partition(";")[0]) from None  # its advice is for another command
    if place.source.kind == "python" and counts.skipped:
        return "", {}  # a few files of the standard library are undecodable on purpose
    return "\n".join(texts), {}


def _line(content: bytes, key: str) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise BadInput(f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8") from None
    except RecursionError:
        raise BadInput("it is nested too deeply for an object with text") from None
    except ValueError as error:
        raise BadInput(f"it is not JSON ({error})") from None
    if not isinstance(value, dict) or key not in value:
        keys = ", ".join(list(value)[:20]) if isinstance(value, dict) else type(value).__name__
        raise BadInput(f"it has no {key!r} (found: {keys})")
    return _checked(value.pop(key)), _metadata(value)


def _rows(place: Place) -> Iterator[tuple[str, int, Any]]:
    for number, row in parquet_rows(place.path):
        yield place.name, number, functools.partial(_parquet_row, row, place.of.text_key)


def _parquet_row(row: dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    text = row.pop(key)
    if isinstance(text, NotUtf8):
        raise BadInput("the text is not UTF-8")
    return _checked(text), _metadata(json.loads(json.dumps(row, default=str)))


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise BadInput(f"the text is {type(text).__name__}, expected text")
    if "\0" in text:
        raise BadInput("the text has a NUL character, which no text has")
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise BadInput(f"\\u{ord(found[0]):04x} is half of a surrogate pair, which is not a character")
    return text


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
    """The other keys of a row; of a document that was written by an earlier step of a curation, its metadata."""
    inner = row.pop("metadata", {})
    found = {**(inner if isinstance(inner, dict) else {"metadata": inner}), **row}
    taken = [name for name in _TAKEN if name in found]
    taken += [name for name, fits in (("edited", _is_edited), ("token_count", _is_count)) if not fits(found.get(name))]
    for name in taken:
        found[f"given_{name}"] = found.pop(name)
    if found.get("scores") and (problem := problem_of_scores(found["scores"])):
        raise BadInput(f"{problem}; rename the key if it is none of a curation")
    return {key: value for key, value in found.items() if not key.startswith("_")}


def _is_edited(value: Any) -> bool:
    """Whether an earlier curation noted ``value``: by filter the characters before and after."""
    pairs = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in pairs)


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))
