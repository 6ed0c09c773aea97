"""A small test set that every machine has: paragraphs of Python's `help()` topics, each with its end as the answer.

`pydoc-questions:COUNT` names COUNT questions, each of another topic. A row has ``question`` and ``answer``, ``text`` (both),
``topic`` and ``id``. The same Python gives the same rows. A corpus with the documentation of Python holds the answers, so it
shows what the removal of leaks does.
"""

import functools
import hashlib
import json
import re
from typing import Any

from launchers.counted import counted
from qwen_moe.data.words import words
from qwen_moe.errors import UserError

PREFIX = "pydoc-questions:"
_SHORTEST, _LONGEST = 40, 120  # words of a paragraph: enough that no other text resembles it by chance
_ANSWER = 8  # words of an answer
_PLAIN = re.compile(r"[A-Za-z'-]+[.,;:!?)]*")


def is_pydoc_questions(name: str) -> bool:
    """Whether the input ``name`` asks for these questions."""
    return name.startswith(PREFIX)


@functools.lru_cache(maxsize=4)
def pydoc_questions_bytes(name: str) -> bytes:
    """The rows that ``name`` asks for, as JSON lines. Raises UserError."""
    return "".join(json.dumps(row) + "\n" for row in pydoc_questions(name)).encode()


def pydoc_questions(name: str) -> list[dict[str, Any]]:
    """The rows that ``name`` asks for. Raises UserError."""
    count = name.removeprefix(PREFIX)
    if not (count.isascii() and count.isdecimal() and int(count[:12]) > 0):
        raise UserError(f"input {name} is not of the form {PREFIX}COUNT, as in {PREFIX}8")
    every = _paragraphs()
    if int(count) > len(every):
        raise UserError(
            f"input {name}: help() of this Python gives only {counted(len(every), 'question')}: ask for fewer"
        )
    return [_row(topic, paragraph) for topic, paragraph in every[: int(count)]]


@functools.cache
def _paragraphs() -> list[tuple[str, str]]:
    """(topic, a paragraph of running text) in an order that hashes decide; each topic and each paragraph once."""
    from pydoc_data.topics import topics

    found = [
        (hashlib.sha256(paragraph.encode()).digest(), topic, paragraph)
        for topic, text in topics.items()
        for paragraph in (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
        if _is_prose(paragraph)
    ]
    met: set[str] = set()
    chosen = []
    for _, topic, paragraph in sorted(found):
        if topic not in met and paragraph not in met:
            met |= {topic, paragraph}
            chosen.append((topic, paragraph))
    return chosen


def _is_prose(paragraph: str) -> bool:
    parts = paragraph.split()
    plain = sum(_PLAIN.fullmatch(part) is not None for part in parts)
    return _SHORTEST <= len(words(paragraph)) <= _LONGEST and plain >= 0.8 * len(parts) and paragraph.endswith(".")


def _row(topic: str, paragraph: str) -> dict[str, Any]:
    parts = paragraph.split(" ")
    question, answer = " ".join(parts[:-_ANSWER]), " ".join(parts[-_ANSWER:])
    return {"id": f"pydoc-{topic}", "topic": topic, "question": question, "answer": answer, "text": paragraph}
