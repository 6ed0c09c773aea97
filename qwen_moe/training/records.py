"""Reading what a run recorded; no torch."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
ATTEMPTS = "attempts.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise
    return records


def earlier_threads(run_dir: Path, world_size: int) -> int:
    """CPU threads per process of the run's last attempt with as many processes; 0 when there is none, or its record is
    damaged."""
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
