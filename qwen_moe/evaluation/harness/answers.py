"""Answers of a model to requests, kept on disk by a hash of the request, so that no forward pass is made twice."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe.errors import UserError
from qwen_moe.line_file import LineFile


def key_of(*parts: Any) -> str:
    """A hash of everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """Answers by key, and the bytes of the whole lines. Raises UserError for a damaged line."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    found: dict[str, Any] = {}
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            found[record["key"]] = record["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{number} is damaged: remove the line, and its request is answered again") from None
    return found, whole


class RequestAnswers:
    """The answers in ``path``, and new ones as they come. A context manager: the file is locked until it is left."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = LineFile(path, lambda path: _read(path)[1], "wait for it, or give another --output")
        self._known, _ = _read(path)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep ``answers`` by key. They are on the disk when this returns."""
        self._file.append_all({"key": key, "answer": answer} for key, answer in answers.items())
        self._known.update(answers)

    def __enter__(self) -> "RequestAnswers":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.__exit__(*raised)
