"""The answers of an episode as a server gives them: kept as they come, so that a run that is stopped asks for none twice."""

import hashlib
import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen_moe.generation.engine import Completion
from qwen_moe.line_file import LineFile

NAME = "answers.jsonl"


class ServedAnswers:
    """The file ``folder / NAME``, open for appending until the end of a ``with`` block. Its first line says which
    weights and settings gave the answers; each other one has those to the query with number ``place`` in the episode."""

    def __init__(self, folder: Path, made_by: str) -> None:
        path = folder / NAME
        self.found: dict[int, list[Completion]] = {}
        lines, _ = _read(path)
        for line in lines[1:]:
            self.found[line["place"]] = [
                Completion(one["tokens"], one["log_probs"], one["finish_reason"]) for one in line["answers"]
            ]
        self._file = LineFile(path, lambda path: _read(path)[1], "another process samples this run's answers, end it")
        self._lock = threading.Lock()
        if not lines:
            self._append({"made_by": made_by})

    def add(self, place: int, answers: list[Completion]) -> None:
        """Keep the answers to a query; they are on the disk when this returns. Threads may call it at once."""
        self.found[place] = answers
        kept = [{"tokens": a.tokens, "log_probs": a.log_probs, "finish_reason": a.finish_reason} for a in answers]
        self._append({"place": place, "answers": kept})

    def _append(self, values: dict[str, Any]) -> None:
        with self._lock:
            self._file.append({**values, "checksum": _checksum(values)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)


def answered_by(folder: Path) -> str | None:
    """What gave the answers that ``folder`` keeps; None if it keeps none."""
    lines, _ = _read(folder / NAME)
    return str(lines[0].get("made_by")) if lines else None


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines before the first that is cut off or damaged, and the bytes that they take."""
    content = path.read_bytes() if path.exists() else b""
    found: list[dict[str, Any]] = []
    size = 0
    for line in content.split(b"\n")[:-1]:
        try:
            values = json.loads(line)
            checksum = values.pop("checksum")
        except (ValueError, AttributeError, KeyError, TypeError):
            break
        if checksum != _checksum(values):
            break
        found.append(values)
        size += len(line) + 1
    return found, size


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
