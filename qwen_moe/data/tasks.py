"""Small tasks with exact answers, generated: rows to learn from, to sample answers to, and to measure on.

`tasks:KIND:COUNT` names COUNT rows of training, `tasks:KIND:COUNT:heldout` COUNT different tasks that training never has,
and `tasks:KIND:COUNT:after:N` COUNT different tasks of training that `tasks:KIND:N` does not have.
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
HELD_OUT, AFTER = "heldout", "after"
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
    kind, count, held_out, after = _parts(name)
    different = held_out or after > 0
    met = {row["prompt"] for row in tasks(f"{PREFIX}{kind}:{after}")} if after else set()
    rng = random.Random(f"{kind}:{held_out}:{after}" if after else f"{kind}:{held_out}")
    rows: list[dict[str, Any]] = []
    in_vain = 0
    while len(rows) < count:
        question, answer = KINDS[kind](rng)
        if is_held_out(question) != held_out or (different and question in met):
            in_vain += 1
            if in_vain > 50_000:
                which = "held-out tasks of this kind" if held_out else f"tasks of this kind beside the first {after:,}"
                raise UserError(f"input {name}: there are only {len(rows):,} {which}: ask for fewer")
            continue
        in_vain = 0
        met.add(question)
        rows.append(
            {
                "id": f"{kind}-{len(rows)}" + (f"-{AFTER}-{after}" if after else ""),
                "kind": kind,
                "prompt": question,
                "completion": answer,
                "answer": answer,
                "text": f"{question} {answer}",
            }
        )
    return rows


def _parts(name: str) -> tuple[str, int, bool, int]:
    """Kind, count, whether they are held out, and the number of rows that they come after."""
    parts = name.removeprefix(PREFIX).split(":")
    number = parts[1] if len(parts) > 1 else ""
    held_out, after = parts[2:] == [HELD_OUT], parts[3] if len(parts) == 4 and parts[2] == AFTER else ""
    if not all(text.isascii() and text.isdigit() for text in (number, after or "0")) or (
        len(parts) > 2 and not held_out and not after
    ):
        raise UserError(
            f"input {name} is not of the form {PREFIX}KIND:COUNT, {PREFIX}KIND:COUNT:{HELD_OUT} or "
            f"{PREFIX}KIND:COUNT:{AFTER}:N, as in {PREFIX}addition:20000"
        )
    if parts[0] not in KINDS:
        raise UserError(f"input {name}: there is no kind {parts[0]!r} of tasks: give one of {', '.join(KINDS)}")
    for text in (number, after or "1"):
        if not 0 < int(text[:12]) <= _MOST:
            raise UserError(f"input {name} asks for {text} tasks: give 1 to {_MOST:,}")
    return parts[0], int(number), held_out, int(after or "0")
