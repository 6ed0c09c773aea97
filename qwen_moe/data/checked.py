"""Which tests prepared data were checked against, from the record that `qwen-moe data decontaminate` leaves."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen_moe.data.manifest import read_manifest
from qwen_moe.data.sources import RECORD, Source
from qwen_moe.data.words import hash_of

_ABOUT = ("rule", "tokens", "index", "least_tokens", "least_share")


def carried(sources: Sequence[Source], digests: Sequence[str]) -> dict[str, Any]:
    """``checks`` (how each input was checked) and ``tests`` (hashes of the tests that all inputs were checked against), for
    PREFIX.json. Empty if some file was not checked, or was changed since then, according to its SHA-256 in ``digests``."""
    records = _records(sources)
    if not any(records.values()):
        return {}
    for source, digest in zip(sources, digests, strict=True):
        if _listed(source, records) != digest:
            print(
                f"{source.path} is not as `qwen-moe data decontaminate` wrote it, so the output counts as not checked for "
                "leaks of tests",
                file=sys.stderr,
            )
            return {}
    return _together(records)


def carried_again(sources: Sequence[Source], before: dict[str, Any]) -> dict[str, Any]:
    """What `carried` says now of data that were prepared when it said ``before``. The files are read only if the records
    have changed since then."""
    records = _records(sources)
    told = _together(records) if all(_listed(source, records) for source in sources) else {}
    return before if told == before else carried(sources, [source.sha256() for source in sources])


def _together(records: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    tests = set.intersection(*(set(record["tests"]["hashes"]) for record in records.values()))
    checks = [{name: record.get(name) for name in _ABOUT} for record in records.values()]
    return {"checks": [check for n, check in enumerate(checks) if check not in checks[:n]], "tests": sorted(tests)}


def _listed(source: Source, records: dict[Path, dict[str, Any]]) -> str | None:
    """The SHA-256 that a file had when it was written, if a record lists it."""
    found: str | None = records[source.path.parent].get("files", {}).get(source.path.name)
    return found


def _records(sources: Sequence[Source]) -> dict[Path, dict[str, Any]]:
    return {folder: _record(folder) for folder in dict.fromkeys(source.path.parent for source in sources)}


def _record(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty if there is none, or none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        ok = isinstance(record["files"], dict) and all(isinstance(one, str) for one in record["tests"]["hashes"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return record if ok else {}


def share_checked(prefix: Path, texts: Iterable[str]) -> float:
    """What share of ``texts`` the data of a prefix were checked against: those that were among the tests, apart from case,
    punctuation and spaces. 0 if nothing is known of the data, or if there are no texts. Raises UserError if PREFIX.json is
    damaged."""
    manifest = read_manifest(prefix)
    known = set(manifest.decontaminated.get("tests", ())) if manifest is not None else set()
    hashes = [hash_of(text) for text in texts] if known else []
    return sum(one in known for one in hashes) / len(hashes) if hashes else 0.0
