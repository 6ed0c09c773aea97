"""Shows examples of chat data as text, with what is learned colored, or between [[ and ]] where there are no colors."""

import os
import sys
from itertools import pairwise
from typing import TextIO

import numpy as np

from launchers.counted import counted
from qwen_moe.data.chat import Chat, Encoded
from qwen_moe.data.chat_rows import Outcome, encoded_rows
from qwen_moe.data.corpus import ReadCounts
from qwen_moe.data.prepare_chat import ChatRequest, find_rows
from qwen_moe.errors import UserError

_COLORS = ("\x1b[32m", "\x1b[0m")
_MARKS = ("[[", "]]")


def preview(request: ChatRequest, count: int, out: TextIO | None = None) -> None:
    """Print the first ``count`` rows that can be used to ``out`` (standard output). Raises UserError if there are none."""
    out = out or sys.stdout
    marks = _COLORS if out.isatty() and "NO_COLOR" not in os.environ else _MARKS
    chat = Chat(request.rules.tokenizer, request.rules.learn)
    rows = encoded_rows(request.rules, find_rows(request.inputs), ReadCounts(), 1)
    problems: list[Outcome] = []
    shown = 0
    for row in rows:
        if not row.documents:
            problems.append(row)
            continue
        names = ("chosen", "rejected") if row.kind == "pairs" else ("",)
        for name, document in zip(names, row.documents, strict=True):
            head = f"{row.where}{f', {name}' if name else ''}"
            cut = f", {row.cut:,} cut off" if row.cut else ""
            print(f"--- {head}: {counted(len(document.ids), 'token')}, {document.learned:,} learned{cut}", file=out)
            print(_colored(chat, document, marks), file=out)
        shown += 1
        if shown == count:
            break
    if not shown and not problems:
        raise UserError(f"{', '.join(request.inputs)}: there is no row, only empty lines; give other --input")
    if problems:
        first = f"{problems[0].where}: {problems[0].problem or problems[0].reason}"
        if not shown:
            raise UserError(f"no row can be used. {first}")
        print(f"{counted(len(problems), 'row')} before the last that is shown cannot be used. {first}", file=sys.stderr)


def _colored(chat: Chat, document: Encoded, marks: tuple[str, str]) -> str:
    edges = [0, *(np.flatnonzero(np.diff(document.learn)) + 1).tolist(), len(document.ids)]
    parts = []
    for first, after in pairwise(edges):
        text = _printable(chat.tokenizer.decode(document.ids[first:after], skip_special_tokens=False))
        parts.append(f"{marks[0]}{text}{marks[1]}" if document.learn[first] else text)
    return "".join(parts)


def _printable(text: str) -> str:
    """Control characters as escapes: a terminal must not obey the data."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
