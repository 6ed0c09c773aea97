"""Conversations to score: JSON lines as `qwen-moe data chat` reads them, and as tokens up to the last one that is scored."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launchers.counted import counted, tallied
from qwen_moe.data.chat import Chat
from qwen_moe.data.conversations import BadRow, kind_of, preferences
from qwen_moe.documents import json_object
from qwen_moe.errors import UserError
from qwen_moe.generation.prompts import check_index

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """A line: its values, and the tokens of its conversation or of both of a pair (the chosen answer first), each up to the
    token that ends the assistant's last turn. ``judged``: of a pair, see `conversations.preferences`."""

    values: dict[str, Any]
    tokens: tuple[list[int], ...]
    judged: dict[str, int] = field(default_factory=dict)


def read_rows(path: Path, chat: Chat, check: Callable[[list[int], str], None]) -> list[ScoredRow]:
    """The rows of a JSONL file, checked by ``check(tokens, what)``. Raises UserError, which counts all rows that cannot be
    scored and names the first."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None
    rows: list[ScoredRow] = []
    problems: Counter[str] = Counter()
    first = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = _row(line, where, chat, check)
            check_index(row.values, len(rows) + problems.total(), where)
            rows.append(row)
        except UserError as error:
            problems[error.reason if isinstance(error, BadRow) else "cannot be read"] += 1
            first = first or f"{where}: {str(error).removeprefix(f'{where}: ')}"
    if problems:
        reasons = ", ".join(tallied(count, reason) for reason, count in problems.most_common())
        raise UserError(
            f"{problems.total():,} of {counted(problems.total() + len(rows), 'row')} cannot be scored ({reasons}). {first}"
        )
    if not rows:
        raise UserError(f"--input {path} has no rows: give JSON lines with conversations or pairs")
    return rows


def _row(line: bytes, where: str, chat: Chat, check: Callable[[list[int], str], None]) -> ScoredRow:
    try:
        values = json_object(line.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise BadRow("not Unicode", f"byte {error.start} of the line is not UTF-8; convert the file") from None
    is_pair = kind_of(values) == "pairs"
    tokens = tuple(scored_tokens(chat, conversation) for conversation in chat.read(values))
    for name, one in zip(ANSWERS if is_pair else ("it",), tokens, strict=True):
        check(one, name)
    return ScoredRow(values=values, tokens=tokens, judged=preferences(values) if is_pair else {})


def scored_tokens(chat: Chat, conversation: Any) -> list[int]:
    """A conversation up to the token that ends the assistant's last turn, which training scores too: templates may write
    more after it."""
    encoded = chat.encode(conversation)
    return encoded.ids[: int(np.flatnonzero(encoded.learn)[-1]) + 1].tolist()


def by_criterion(criteria: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    return dict(zip(criteria, scores, strict=True))
