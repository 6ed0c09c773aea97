"""The answers of an evaluation: one JSON object a line, written as they come and read again by the same command."""

import json
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json
from qwen_moe.alone import alone
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError
from qwen_moe.evaluation.plan import Item
from qwen_moe.line_file import LineFile

SETTINGS = "settings.json"
LOCK = SETTINGS + ".lock"  # while the settings are written
PATTERN = "answers-*.jsonl"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "length": int,
    "depth": (float, int, type(None)),
    "sample": int,
    "tokens": int,
    "answers": list,
    "completion": str,
    "seconds": (float, int),
}


def item_of(record: dict[str, Any]) -> Item:
    return Item(record["task"], record["length"], record["depth"], record["sample"])


def _problem(line: bytes) -> tuple[dict[str, Any], str]:
    """The record of a line, and what is wrong with it; empty if nothing is."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}, "it is not JSON"
    if not isinstance(record, dict):
        return {}, "it is not an object"
    for name, kind in _KINDS.items():
        if not isinstance(record.get(name, ...), kind) or isinstance(record[name], bool):
            return {}, f"its {name} is {record.get(name)!r:.60}"
    if not record["answers"] or not all(isinstance(answer, str) for answer in record["answers"]):
        return {}, "its answers are not texts"
    return record, ""


def read_answers(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and the bytes that they take. A last line that a crash has cut off is left out.

    Raises UserError for a damaged line before the last.
    """
    content = path.read_bytes() if path.exists() else b""
    records: list[dict[str, Any]] = []
    size = 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut off
        record, problem = _problem(line)
        if problem:
            if number == len(lines) - 1 and not lines[-1]:
                break
            raise UserError(
                f"{path}:{number} is damaged ({problem}): remove the line, and its prompt is completed again"
            )
        records.append(record)
        size += len(line) + 1
    return records, size


def read_all(output: Path) -> dict[Item, dict[str, Any]]:
    """The answers of all shards. Raises UserError."""
    found: dict[Item, dict[str, Any]] = {}
    for path in sorted(output.glob(PATTERN)):
        for record in read_answers(path)[0]:
            found.setdefault(item_of(record), record)
    return found


class AnswerFile(LineFile):
    """The file of one shard, open for appending, and locked until it is closed. Raises UserError if another process
    has it."""

    def __init__(self, output: Path, shard: int) -> None:
        super().__init__(
            output / PATTERN.replace("*", str(shard)),
            lambda path: read_answers(path)[1],
            "wait for it, give each process its own --shard, or give another --output",
        )


def claim_folder(output: Path, settings: dict[str, Any]) -> None:
    """Make ``output`` the folder of an evaluation with ``settings``, or find that it is. Raises UserError if it belongs to
    another one or to something else."""
    path = output / SETTINGS
    if not path.is_file():
        others = output.is_dir() and any(entry.name != LOCK for entry in output.iterdir())
        # Looked at again: another process of this evaluation may have begun in between.
        if (others or (output.exists() and not output.is_dir())) and not path.is_file():
            raise UserError(f"{output} is not empty and holds no evaluation: give another --output")
        output.mkdir(parents=True, exist_ok=True)
        with alone(path):  # of two evaluations that begin at once, the second finds the settings of the first
            if not path.is_file():
                write_json(path, settings)
    there = json_object(read_text(path, "the settings", "another --output"), str(path))
    wanted = json.loads(json.dumps(settings))
    differ = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    if differ:
        changes = "; ".join(f"{name}: {_short(there, name)} there, {_short(wanted, name)} now" for name in differ)
        raise UserError(
            f"{output} holds the answers to another evaluation ({changes}): give the same options, or another --output"
            + (". The model is another one, or was trained further since" if differ == ["model"] else "")
        )


def _short(settings: dict[str, Any], name: str) -> str:
    text = json.dumps(settings[name]) if name in settings else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."
