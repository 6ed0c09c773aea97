"""RULER's needle-in-a-haystack tasks (arXiv 2404.06654; github.com/NVIDIA/RULER, scripts/data/synthetic/niah.py)."""

import uuid
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

from qwen_moe.evaluation.scoring import share_found
from qwen_moe.evaluation.tasks.haystack import NOISE, Essay, sentences
from qwen_moe.evaluation.tasks.task import Draft, Question, Task
from qwen_moe.evaluation.tasks.word_list import ADJECTIVES, NOUNS

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# In the original's words. The last sentence is its "answer prefix", which the model continues.
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)
TEMPLATE_OF_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
NEW_TOKENS = 128
# 40 depths in percent, from 0 to 100, rounded as numpy rounds.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))

Kind = Literal["numbers", "words", "uuids"]


@dataclass(frozen=True, kw_only=True)
class Needles:
    """What is hidden where. ``keys`` needles with ``values`` values each, of which ``queries`` keys are asked for."""

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


# The rows of the original's synthetic.yaml. Four queries need four keys, as in the original.
NIAH = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="essay"),
    "niah_single_3": Needles(haystack="essay", value="uuids"),
    "niah_multikey_1": Needles(haystack="essay", keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles(haystack="essay", values=4),
    "niah_multiquery": Needles(haystack="essay", keys=4, queries=4),
}
_UNITS = {"noise": "five noise sentences", "essay": "a word", "needle": "a needle"}


def _drawn(kind: Kind, rng: Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _other(kind: Kind, rng: Random, taken: set[str]) -> str:
    """A drawn value that is none of ``taken``."""
    while (value := _drawn(kind, rng)) in taken:
        pass
    return value


class _Distractors:
    """Needles that nobody asks for. The first n are the same for every size of the haystack."""

    def __init__(self, needles: Needles, rng: Random, asked: set[str]) -> None:
        self.needles, self.rng, self.asked = needles, rng, asked
        self.found: list[str] = []

    def first(self, count: int) -> list[str]:
        while len(self.found) < count:
            key, value = (
                _other(self.needles.key, self.rng, self.asked),
                _other(self.needles.value, self.rng, self.asked),
            )
            self.found.append(NEEDLE.format(kind=self.needles.value, key=key, value=value))
        return self.found[:count]


def _in_essay(essay: Essay, count: int, hidden: list[str], depths: list[int]) -> str:
    """``hidden`` needles between the sentences of the first ``count`` words, at ``depths`` in percent."""
    parts = sentences(essay.text(count))
    places = [0, *sorted(int(len(parts) * (depth / 100)) for depth in depths), len(parts)]
    pieces = []
    for number, (begin, end) in enumerate(pairwise(places)):
        pieces.append(" ".join(parts[begin:end]))
        pieces += hidden[number : number + 1]
    return " ".join(pieces)


def _among(lines: list[str], hidden: list[str], rng: Random) -> str:
    """``hidden`` needles as lines of their own, at random places among ``lines``."""
    places = sorted(rng.sample(range(len(lines)), len(hidden)), reverse=True)
    lines = list(lines)
    for place, needle in zip(places, hidden):
        lines.insert(place, needle)
    return "\n".join(lines)


def _draft(needles: Needles, essay: Essay, question: Question) -> Draft:
    rng = question.rng
    keys: list[str] = []
    for _ in range(needles.keys):
        keys.append(_other(needles.key, rng, set(keys)))
    values: list[list[str]] = []
    taken = set(keys)
    for _ in keys:
        values.append([])
        for _ in range(needles.values):
            values[-1].append(_other(needles.value, rng, taken))
            taken.add(values[-1][-1])
    hidden = [
        NEEDLE.format(kind=needles.value, key=key, value=value)
        for key, several in zip(keys, values, strict=True)
        for value in several
    ]
    rng.shuffle(hidden)
    depths = rng.sample(DEPTHS, len(hidden))
    asked = rng.sample(range(needles.keys), needles.queries)
    distractors = _Distractors(needles, Random(rng.getrandbits(64)), taken)
    places_seed = rng.getrandbits(64)
    queries = [keys[index] for index in asked]
    query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
    one = needles.queries * needles.values == 1

    def text(count: int) -> str:
        if needles.haystack == "essay":
            context = _in_essay(essay, count, hidden, depths)
        else:
            lines = [NOISE] * count if needles.haystack == "noise" else distractors.first(count)
            context = _among(lines, hidden, Random(places_seed))
        kind = needles.value.removesuffix("s") if one else needles.value
        return (TEMPLATE_OF_ONE if one else TEMPLATE).format(kind=kind, context=context, query=query)

    answers = tuple(value for index in asked for value in values[index])
    return Draft(text=text, answers=answers, least=len(hidden))


def niah_task(name: str, essay: Essay) -> Task:
    """One of `NIAH`."""
    needles = NIAH[name]
    return Task(
        name=name,
        new_tokens=NEW_TOKENS,
        unit=_UNITS[needles.haystack],
        score=share_found,
        draft=lambda question: _draft(needles, essay, question),
    )
