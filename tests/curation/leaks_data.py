"""Helpers of the tests of leaks: brute force, random texts, planted copies, and the command."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_moe.cli import main
from qwen_moe.curation.leaks.finder import Finder
from qwen_moe.curation.leaks.index import Seeds
from qwen_moe.curation.leaks.sequences import Sequences, TestSequence
from qwen_moe.curation.leaks.tokens import Words

VOCABULARY = [a + b for a in "bdfgklmnprstvz" for b in ("ana", "eli", "oru", "ut", "ix", "ome", "ad", "ern")]


def table_lcs(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the longest common subsequence, by the textbook's table."""
    row = [0] * (len(second) + 1)
    for one in first:
        above, row = row, [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if one == other else max(above[place + 1], row[-1]))
    return row[-1]


def table_edits(pattern: Sequence[Any], text: Sequence[Any]) -> int:
    """The least number of edits that turn a stretch of ``text`` into ``pattern``, by the textbook's table."""
    row = [0] * (len(text) + 1)
    for count, one in enumerate(pattern, 1):
        above, row = row, [count]
        for place, other in enumerate(text):
            row.append(min(above[place] + (one != other), above[place + 1] + 1, row[-1] + 1))
    return min(row)


def brute_force(document: Sequence[str], test: Sequence[str], rule: str) -> bool:
    """The rule as the documentation says it, over everything."""
    shorter, longer = sorted((document, test), key=len)
    spans = [longer]
    if rule != "report" and shorter and len(longer) > 2 * len(shorter):
        spans = [longer[n : n + 2 * len(shorter)] for n in range(0, len(longer), len(shorter))]
        # What is left at the end, and is in the window before, is no window of its own.
        spans = [span for span in spans if len(span) > len(shorter)]
    if rule == "close":
        spans = [span for span in spans if 5 * table_edits(shorter, span) <= len(shorter)]
    most = max((table_lcs(shorter, span) for span in spans), default=0)
    return most >= 13 and 10 * most >= 6 * len(shorter)


def finder(tests: Sequence[Sequence[str]], rule: str = "windowed", seeds: str = "words") -> Finder:
    found = [TestSequence(" ".join(test), "tests.jsonl", number) for number, test in enumerate(tests, 1)]
    return Finder(Sequences(found=found), Words(), Seeds(seeds), rule)  # type: ignore[arg-type]


def leaked(found: Finder, document: Sequence[str]) -> set[int]:
    return {match.test for match in found.matches(document)}


def draw(rng: random.Random, length: int, words: int = len(VOCABULARY)) -> list[str]:
    """Words, of which some are frequent and most are rare, as in a language."""
    return rng.choices(VOCABULARY[:words], weights=[1 / (n + 1) for n in range(words)], k=length)


def changed(rng: random.Random, test: Sequence[str], share: float) -> list[str]:
    """A copy with ``share`` of the words replaced by words that no test has."""
    copy = list(test)
    for place in rng.sample(range(len(copy)), int(share * len(copy))):
        copy[place] = f"new{rng.randrange(1000)}"
    return copy


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decontaminate(folder: Path, *options: str, inputs: str = "docs.jsonl", against: str = "tests.jsonl") -> int:
    """The command, on files of ``folder``; its output is ``folder``/clean."""
    given = ["--input", str(folder / inputs), "--against", str(folder / against), "--output", str(folder / "clean")]
    return main(["data", "decontaminate", *given, *options])
