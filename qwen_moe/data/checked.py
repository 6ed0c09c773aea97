"""Which tests prepared data were checked against: the record of `qwen-moe data decontaminate` is carried on."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_moe.data.sources import RECORD, Source

_ABOUT = ("rule", "tokens", "index", "least_tokens", "least_share")


def carried(sources: Sequence[Source], digests: Sequence[str]) -> dict[str, Any]:
    """``checks`` (how each input was checked) and ``tests`` (hashes of the tests that all inputs were checked against), for
    PREFIX.json. Empty if some file was not checked, or was changed since then, according to its SHA-256 in ``digests``."""
    records = {source.path.parent: _record(source.path.parent) for source in sources}
    if not any(records.values()):
        return {}
    tests: set[str] | None = None
    for source, digest in zip(sources, digests, strict=True):
        record = records[source.path.parent]
        if record.get("files", {}).get(source.path.name) != digest:
            print(
                f"{source.path} is not as `qwen-moe data decontaminate` wrote it, so the output counts as not checked for "
                "leaks of tests",
                file=sys.stderr,
            )
            return {}
        hashes = set(record["tests"]["hashes"])
        tests = hashes if tests is None else tests & hashes
    checks = [{name: record.get(name) for name in _ABOUT} for record in records.values()]
    return {
        "checks": [check for n, check in enumerate(checks) if check not in checks[:n]],
        "tests": sorted(tests or ()),
    }


def _record(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty if there is none, or none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        ok = isinstance(record["files"], dict) and all(isinstance(one, str) for one in record["tests"]["hashes"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return record if ok else {}
