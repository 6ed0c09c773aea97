"""`decontaminated.json`: what an output was checked against.

`qwen-moe data prepare` and `data chat` carry the tests' hashes to PREFIX.json (`qwen_moe/data/checked.py`).
"""

import json
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json
from qwen_moe.curation.leaks.sequences import Sequences
from qwen_moe.curation.leaks.settings import LEAST_SHARE, LEAST_TOKENS, MOST_CHANGED, LeakSettings
from qwen_moe.data.sources import RECORD
from qwen_moe.data.tokenizer import tokenizer_hash
from qwen_moe.errors import UserError


def how(settings: LeakSettings) -> dict[str, Any]:
    """The rule and what decides its outcome, beside the tests."""
    close = {"most_changed": 1 / MOST_CHANGED} if settings.rule == "close" else {}
    return {
        "rule": settings.rule,
        "least_tokens": LEAST_TOKENS,
        "least_share": LEAST_SHARE[0] / LEAST_SHARE[1],
        "tokens": "words" if settings.tokenizer is None else f"tokenizer {tokenizer_hash(settings.tokenizer)}",
        "index": settings.seeds,
    } | close


def write_record(
    output: Path, settings: LeakSettings, sequences: Sequences, *, request: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the record of a finished output. ``facts``: its counts and files. Returns the record."""
    tests = {"hashes": sequences.hashes, "files": facts.pop("tests"), "short": sequences.short.counts}
    record = {"version": 1, "request": request} | how(settings) | facts | {"tests": tests}
    write_json(output / RECORD, record)
    return record


def read_record(output: Path) -> dict[str, Any] | None:
    """The record of an output; None if there is none. Raises UserError if it is damaged."""
    path = output / RECORD
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(record["request"], str) and isinstance(record["files"], dict)
        assert isinstance(record["counts"], dict) and isinstance(record["tests"]["files"], dict)
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
        raise UserError(f"{path} is damaged: make the output again with --overwrite") from None
    return record
