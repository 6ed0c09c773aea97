"""Small tasks with exact answers, generated: rows to learn from, to sample answers to, and to measure on.

`tasks:KIND:COUNT` names COUNT rows of training, `tasks:KIND:COUNT:heldout` COUNT different tasks that training never has.
A row has ``prompt``, ``completion`` and ``answer`` (equal), ``text`` (both), ``kind`` and ``id``.
"""

import functools
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from qwen_moe.errors import UserError

PREFIX = "tasks:"
HELD_OUT = "heldout"
_SHARE = 8  # one task of so many is held out
_MOST = 5_000_000  # rows, which are held in memory
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Task = tuple[str, str]  # the question and its answer


def _addition(rng: random.Random) -> Task:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a}+{b}=", str(a + b)


def _subtraction(rng: random.Random) -> Task:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a}-{b}=", str(a - b)


def _reverse(rng: random.Random) -> Task:
    word = "".join(rng.choices(_LETTERS, k=rng.randint(3, 6)))
    return f"reverse {word}", word[::-1]


def _sort(rng: random.Random) -> Task:
    word = "".join(rng.choices(_LETTERS, k=rng.randint(3, 6)))
    return f"sort {word}", "".join(sorted(word))


def _mixed(rng: random.Random) -> Task:
    return rng.choice([_addition, _subtraction, _reverse, _sort])(rng)


KINDS: dict[str, Callable[[random.Random], Task]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "reverse": _reverse,
    "sort": _sort,
    "mixed": _mixed,
}


def is_tasks(name: str) -> bool:
    """Whether the input ``name`` asks for generated tasks."""
    return name.startswith(PREFIX)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out tasks, whatever the seed and the count."""
    return hashlib.sha256(question.encode()).digest()[0] % _SHARE == 0


@functools.lru_cache(maxsize=4)
def tasks_bytes(name: str) -> bytes:
    """The rows that ``name`` asks for, as JSON lines. A name always gives the same rows. Raises UserError."""
    return "".join(json.dumps(row) + "\n" for row in tasks(name)).encode()


def tasks(name: str) -> list[dict[str, Any]]:
    """The rows that ``name`` asks for. Raises UserError."""
    kind, count, held_out = _parts(name)
    rng = random.Random(f"{kind}:{held_out}")
    rows: list[dict[str, Any]] = []
    met: set[str] = set()
    in_vain = 0
    while len(rows) < count:
        question, answer = KINDS[kind](rng)
        if is_held_out(question) != held_out or (held_out and question in met):
            in_vain += 1
            if in_vain > 50_000:
                raise UserError(
                    f"input {name}: there are only {len(rows):,} held-out tasks of this kind: ask for fewer"
                )
            continue
        in_vain = 0
        met.add(question)
        rows.append(
            {
                "id": f"{kind}-{len(rows)}",
                "kind": kind,
                "prompt": question,
                "completion": answer,
                "answer": answer,
                "text": f"{question} {answer}",
            }
        )
    return rows


def _parts(name: str) -> tuple[str, int, bool]:
    parts = name.removeprefix(PREFIX).split(":")
    number = parts[1] if len(parts) > 1 else ""
    held_out = parts[2:] == [HELD_OUT]
    if not number.isascii() or not number.isdigit() or len(parts) > 3 or (len(parts) == 3 and not held_out):
        raise UserError(
            f"input {name} is not of the form {PREFIX}KIND:COUNT or {PREFIX}KIND:COUNT:{HELD_OUT}, as in "
            f"{PREFIX}addition:20000"
        )
    if parts[0] not in KINDS:
        raise UserError(f"input {name}: there is no kind {parts[0]!r} of tasks: give one of {', '.join(KINDS)}")
    if not 0 < int(number[:12]) <= _MOST:
        raise UserError(f"input {name} asks for {number} tasks: give 1 to {_MOST:,}")
    return parts[0], int(number), held_out
