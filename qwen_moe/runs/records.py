"""Reads the records of a run; no torch."""

import json
from pathlib import Path
from typing import Any

from qwen_moe.errors import UserError

ATTEMPTS = "attempts.jsonl"
RESOLVED = "config.yaml"  # the recipe with every setting
# Optional fields of a record that must be numbers, because readers compute with them.
NUMBERS = (
    "loss",
    "validation_loss",
    "tokens",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "model_flops_per_second",
    "share_of_peak",
    "memory_bytes",
    "expert_imbalance_max",
    "expert_imbalance_mean",
    "balance_loss",
    "sequence_length",
    "reward",
    "used_answers",
    "held_out_reward",
)


class DamagedRecords(UserError, ValueError):
    """A line of metrics.jsonl is not one that a run writes."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _problem(record: Any) -> str:
    """What is wrong with a parsed line; empty if nothing is."""
    if not isinstance(record, dict):
        return f"it is not an object but {type(record).__name__}"
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return f"its step is {step!r}"
    numbers = [*NUMBERS, *(name for name in record if name.startswith(("validation_loss_", "validation_loss/")))]
    wrong = [name for name in numbers if name in record and not _is_number(record[name])]
    if wrong:
        return f"its {wrong[0]} is {record[wrong[0]]!r:.60}"
    counts = record.get("expert_counts")
    rows: list[Any] = counts if isinstance(counts, list) and counts else [counts]
    if not isinstance(record.get("stage", ""), str):
        return f"its stage is {record['stage']!r:.60}"
    if counts is not None and not all(
        isinstance(row, list) and row and len(row) == len(rows[0]) and all(map(_is_number, row)) for row in rows
    ):
        return "its expert_counts are not rows of equal length"
    return ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that a crash has cut off is ignored. Raises DamagedRecords."""
    if not path.exists():
        return []
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DamagedRecords(f"{path} is damaged: byte {error.start} is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, object_pairs_hook=_once)
            problem = _problem(record)
        except (ValueError, RecursionError):
            if number == len(lines):
                continue
            problem = "it is not JSON"
        if problem:
            raise DamagedRecords(f"{path}:{number} is damaged ({problem}): remove the line to read the others")
        records.append(record)
    return records


def earlier_threads(run_dir: Path, world_size: int) -> int:
    """CPU threads per process of the run's last attempt with ``world_size`` processes; 0 if there is no such attempt or its
    record is damaged."""
    try:
        lines = (run_dir / ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            record = json.loads(line)
            if int(record["world_size"]) == world_size and 0 < int(record["threads"]) < 10_000:
                return int(record["threads"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
