"""Finds the files of a corpus, in a fixed order, and counts which files of a folder are left out and why."""

import hashlib
import io
import os
import stat
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from launchers.counted import tallied
from qwen_moe.data.packed import PACKED_ENDINGS
from qwen_moe.data.passkey import is_passkey, passkey_bytes
from qwen_moe.data.pydoc_questions import is_pydoc_questions, pydoc_questions_bytes
from qwen_moe.data.tasks import is_tasks, tasks_bytes
from qwen_moe.errors import UserError

PYTHON_STDLIB = "python-stdlib"
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".py", ".text")
_JSONL_ENDINGS = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
HIDDEN = "hidden"
TWICE = "met before under another name"
BROKEN_LINK = "link to nothing"
SPECIAL = "no regular file"
# `qwen-moe data decontaminate` writes this file, and beside it a folder of what it dropped.
RECORD, DROPPED = "decontaminated.json", "dropped"
CHECKED = (RECORD, "leaks.json", "leaks.html")  # what a check for leaks writes beside texts, and is no text
LEAKS = "dropped as leaks of tests"
_NAMED = 3
Seen = set[tuple[int, int] | str]


_MADE = {"passkey": passkey_bytes, "tasks": tasks_bytes, "pydoc-questions": pydoc_questions_bytes}


class MissingInput(UserError):
    """An input does not exist."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of the corpus. ``kind`` says how it is divided into documents. With ``passkey``, ``tasks`` and
    ``pydoc-questions`` (the latter two are JSON lines) there is no file, and ``path`` is the name of documents that are
    generated."""

    path: Path
    kind: Literal["text", "jsonl", "python", "passkey", "tasks", "pydoc-questions", "parquet"]
    bytes: int

    @property
    def has_lines(self) -> bool:
        """Whether it has a JSON object on each line."""
        return self.kind in ("jsonl", "tasks", "pydoc-questions")

    @property
    def has_rows(self) -> bool:
        """Whether each of its documents comes with other values: lines of JSON, and rows of Parquet."""
        return self.has_lines or self.kind == "parquet"

    def open(self) -> BinaryIO:
        made = _MADE.get(self.kind)
        return io.BytesIO(made(str(self.path))) if made is not None else self.path.open("rb")

    def sha256(self) -> str:
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def status(self) -> str:
        """What shows without reading a file that it is unchanged: its size and modification time."""
        if self.kind in _MADE:
            return f"{self.bytes}|{self.sha256()}"
        stat = self.path.stat()
        return f"{stat.st_size}|{stat.st_mtime_ns}"


class Tally:
    """Counts by reason, with the first few names for each reason."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= _NAMED:
            self._first.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        parts = []
        for reason, count in self.counts.items():
            more = ", ..." if count > _NAMED else ""
            parts.append(f"{tallied(count, reason)} ({', '.join(self._first[reason])}{more})")
        return "; ".join(parts)


@dataclass
class Corpus:
    """The files that are read, in order, and counts of files that are left out. ``parquet``: whether files of Parquet are
    wanted, too."""

    parquet: bool = False
    sources: list[Source] = field(default_factory=list)
    left_out: Tally = field(default_factory=Tally)

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in self.sources)

    def __str__(self) -> str:
        count = len(self.sources)
        text = f"{count:,} file{'s' if count != 1 else ''}, {self.bytes:,} bytes"
        return f"{text}; left out: {self.left_out}" if self.left_out.counts else text


def find_corpus(inputs: Sequence[str], *, parquet: bool = False) -> Corpus:
    """Every file behind ``inputs`` (paths of files and directories, ``python-stdlib``, ``passkey:DOCUMENTS:LONGEST``,
    ``tasks:KIND:COUNT``, or ``pydoc-questions:COUNT``), in a fixed order.

    Links in directories are followed. Files that are hidden, have an unknown suffix or were already found under another
    name are left out and counted. Files of Parquet are found only if ``parquet``. Raises MissingInput if a path does not
    exist; raises UserError for an unknown suffix, an input given twice, an unreadable directory, or if there is nothing to
    read.
    """
    corpus = Corpus(parquet=parquet)
    seen: Seen = set()
    for number, name in enumerate(inputs):
        path = Path(name)
        if not name:
            raise UserError(f"input {number + 1} is empty: give files, directories or {PYTHON_STDLIB!r}")
        if name in inputs[:number]:
            raise UserError(f"input {name} is given twice, so each document would be read twice: give it once")
        if name == PYTHON_STDLIB:
            corpus.sources.extend(_standard_library())
        elif (kind := _made(name)) is not None:
            corpus.sources.append(Source(path=path, kind=kind, bytes=len(_MADE[kind](name))))
        elif path.is_dir():
            before = len(corpus.sources)
            _add_directory(corpus, path, seen)
            if len(corpus.sources) == before:
                left_out = f"; left out: {corpus.left_out}" if corpus.left_out.counts else ""
                raise UserError(f"{path} contains no text: expected files ending in {_endings(parquet)}{left_out}")
        elif path.is_file():
            _add(corpus, _source(path, corpus.parquet), seen)
        elif path.exists():
            raise UserError(f"input {name} is a pipe or device: give files, directories or {PYTHON_STDLIB!r}")
        else:
            raise MissingInput(f"input {name} does not exist: give files, directories or {PYTHON_STDLIB!r}")
    if corpus.bytes == 0:
        raise UserError(f"the corpus is empty: there is no text in {', '.join(inputs)}; give other inputs")
    return corpus


def _made(name: str) -> Literal["passkey", "tasks", "pydoc-questions"] | None:
    """The kind of generated documents that an input names."""
    if is_passkey(name):
        return "passkey"
    if is_tasks(name):
        return "tasks"
    return "pydoc-questions" if is_pydoc_questions(name) else None


def _endings(parquet: bool) -> str:
    text = f"{' '.join(_TEXT_ENDINGS + _JSONL_ENDINGS)} (or these with {', '.join(PACKED_ENDINGS)})"
    return f"{text}, {_PARQUET}" if parquet else text


def _kind(path: Path, parquet: bool) -> Literal["text", "jsonl", "parquet"] | None:
    name = path.name.lower()
    if name.endswith(_PARQUET):
        return "parquet" if parquet else None
    for ending in PACKED_ENDINGS:
        if name.endswith(ending):
            name = name.removesuffix(ending)
            break
    if name.endswith(_JSONL_ENDINGS):
        return "jsonl"
    return "text" if name.endswith(_TEXT_ENDINGS) else None


def _source(path: Path, parquet: bool) -> Source:
    kind = _kind(path, parquet)
    if kind is None:
        hint = " (if it has one JSON object per line, name it .jsonl)" if ".json" in path.suffixes else ""
        raise UserError(f"{path}: the ending is not known; expected one of {_endings(parquet)}{hint}")
    return Source(path=path, kind=kind, bytes=path.stat().st_size)


def _identity(path: Path) -> tuple[int, int] | str:
    """A key that is equal for two names of one file. On file systems without inode numbers it is the name."""
    status = path.stat()
    return (status.st_dev, status.st_ino) if status.st_ino else str(path)


def _add(corpus: Corpus, source: Source, seen: Seen) -> None:
    identity = _identity(source.path)
    if identity in seen:
        corpus.left_out.add(TWICE, str(source.path))
    else:
        seen.add(identity)
        corpus.sources.append(source)


def _add_directory(corpus: Corpus, root: Path, seen: Seen) -> None:
    """Add the files below ``root`` in the order of their paths. A directory that is found again (a link to a parent, two
    links to one directory) is left out."""
    files: list[Path] = []
    met: Seen = set()

    def walk(folder: Path) -> None:
        if _identity(folder) in met:
            corpus.left_out.add(TWICE, f"{folder}/")
            return
        met.add(_identity(folder))
        # Entries that are not links come first, so that a directory is known by its own path.
        for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                corpus.left_out.add(HIDDEN, f"{path}/" if path.is_dir() else str(path))
            elif entry.name in CHECKED and (folder / RECORD).is_file():
                continue
            elif entry.name == DROPPED and path.is_dir() and (folder / RECORD).is_file():
                corpus.left_out.add(LEAKS, f"{path}/")
            elif path.is_dir():
                walk(path)
            elif _is_wanted(path, corpus):
                files.append(path)

    walk(root)
    # In the same way, a link to a file that is also found by its own path is left out, wherever it sorts.
    kept: dict[tuple[int, int] | str, Path] = {}
    for path in sorted(files, key=lambda path: (path.is_symlink(), path)):
        if kept.setdefault(_identity(path), path) != path:
            corpus.left_out.add(TWICE, str(path))
    for path in sorted(kept.values()):
        _add(corpus, _source(path, corpus.parquet), seen)


def _is_wanted(path: Path, corpus: Corpus) -> bool:
    left_out = corpus.left_out
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        left_out.add(BROKEN_LINK, str(path))
        return False
    if not stat.S_ISREG(mode):
        left_out.add(SPECIAL, str(path))
    elif _kind(path, corpus.parquet) is None:
        packed = path.suffix.lower() in PACKED_ENDINGS
        ending = "".join(path.suffixes[-2:]) if packed else path.suffix
        left_out.add(f"ending in {ending}" if ending else "without an ending", str(path))
    else:
        return True
    return False


def _standard_library() -> list[Source]:
    """Every .py file of the running interpreter's library, without installed packages. A hash of the path shuffles the
    order, so that a validation tail does not come from the end of the alphabet only."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts) and path.is_file():
            files.append((hashlib.sha256(relative.as_posix().encode()).digest(), path))
    if not files:
        raise UserError(f"{root} contains no .py file: this interpreter ships its library compiled; give another input")
    return [Source(path=path, kind="python", bytes=path.stat().st_size) for _, path in sorted(files)]
