"""A folder of scored documents: a file for each group of input files, written block by block, and continued after a stop.

======================  =============================================================================================
``manifest.json``       what decides the results: the inputs, the scorer, how documents are read
``00000.jsonl``         documents with their metadata, in the order of the input
``00000.json``          of that file: its input, the number of documents, what was left out, a SHA-256
``summary.json``        counts and figures of all files, with ``scores.png``
======================  =============================================================================================

A file grows as ``00000.jsonl.partial``. A block of documents is handed to the scorer together, and is on the disk before the
next one begins, so that a command that goes on after a kill hands over the same blocks and writes the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json
from qwen_moe.curation.scores.documents import Document
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError

MANIFEST, SUMMARY, PICTURE, FORMAT = "manifest.json", "summary.json", "scores.png", 1


class Store:
    """The writer of a folder. Raises UserError if it holds something else, or was begun with other ``settings``."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], files: int) -> None:
        self.folder, self.files = folder, files
        values: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "files": files, **settings}))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if path.exists():
            before = json_object(read_text(path, "the manifest", "a folder of scores"), str(path))
            changed = [
                f"{name} {_short(before.get(name))} is now {_short(values.get(name))}"
                for name in {**before, **values}
                if before.get(name) != values.get(name)
            ]
            if changed:
                raise UserError(
                    f"{folder} was begun with other settings ({'; '.join(changed)}): repeat the command with the former to "
                    "go on, or give another --output"
                )
        elif others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
            raise UserError(f"--output {folder} holds {others[0]} and no scores: give another folder")
        else:
            write_json(path, values)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.jsonl"

    def facts(self, index: int) -> dict[str, Any]:
        """What is known of a finished file."""
        path = self.path(index).with_suffix(".json")
        return json_object(read_text(path, "facts", "a folder of scores"), str(path))

    def is_done(self, index: int) -> bool:
        return self.path(index).exists()

    def left(self) -> list[int]:
        """Files that are not done."""
        return [index for index in range(self.files) if not self.is_done(index)]

    def check(self) -> None:
        """Raise UserError for a finished file that is not as it was written."""
        for index in range(self.files):
            if hashlib.sha256(self.path(index).read_bytes()).hexdigest() != self.facts(index).get("sha256"):
                raise UserError(f"{self.path(index)} was changed since: remove it, and the same command makes it again")

    def rows(self) -> Iterator[dict[str, Any]]:
        """All documents of finished files, in order."""
        for index in range(self.files):
            with self.path(index).open("rb") as file:
                for line in file:
                    yield json.loads(line)


class Growing:
    """A file of ``store`` in the making. ``done``: how many documents are there already, a multiple of ``block``."""

    def __init__(self, store: Store, index: int, block: int) -> None:
        self._path, self._block = store.path(index), block
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._digest, self._documents = hashlib.sha256(), 0
        self._found: list[str] = []  # of each document its id and text
        self._find()

    @property
    def done(self) -> int:
        return len(self._found)

    def _find(self) -> None:
        """The whole blocks of an earlier attempt; what lies behind them is dropped."""
        try:
            content = self._partial.read_bytes()
            lines = content.splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            kept = whole[: len(whole) // self._block * self._block]
            self._found = [_mark(row["id"], row["text"]) for row in map(json.loads, kept)]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):  # damaged: all of it is made again
            kept = []
            self._found = []
        for line in kept:
            self._digest.update(line)
        with self._partial.open("rb+") as file:
            file.truncate(sum(map(len, kept)))
        self._documents = len(kept)

    def fits(self, number: int, document: Document) -> bool:
        """Whether document ``number`` of those that are `done` is this one: its input may have changed unnoticed."""
        return self._found[number] == _mark(document.id, document.text)

    def begin_anew(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._digest, self._documents, self._found = hashlib.sha256(), 0, []

    def add(self, documents: list[Document]) -> None:
        """Write a block. It is on the disk when this returns."""
        content = b"".join(document.line() for document in documents)
        with self._partial.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(content)
        self._documents += len(documents)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Give the file its name. Its facts come first: without the name they count for nothing."""
        values = {"documents": self._documents, **facts, "sha256": self._digest.hexdigest()}
        write_json(self._path.with_suffix(".json"), values)
        self._partial.touch()
        os.replace(self._partial, self._path)


def _mark(name: str, text: str) -> str:
    return hashlib.sha256(json.dumps([name, text]).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:80]}..."
