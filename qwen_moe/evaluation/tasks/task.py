"""What a task is, and how a prompt gets its length."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from launchers.counted import counted

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a prompt is asked to be.

    ``length``: the most tokens of prompt and completion together. ``sample`` counts from 0. ``depth``: where the answer
    lies, from 0 (beginning) to 1; None if the task chooses. ``rng`` is seeded by both, the task's name and the seed.
    """

    length: int
    sample: int
    depth: float | None
    rng: Random
    encode: Encode


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt whose haystack has no size yet: ``text(n)`` has n >= ``least`` units of it. More units make more
    tokens."""

    text: Callable[[int], str]
    answers: tuple[str, ...]
    least: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """``new_tokens``: tokens that the model may generate. ``unit``: what the haystack is made of. ``score``: from a cleaned
    completion and the answers to a number from 0 to 1."""

    name: str
    new_tokens: int
    unit: str
    score: Callable[[str, Sequence[str]], float]
    draft: Callable[[Question], Draft]


# Interpolation finds the size in a few tries; after this many, halving takes over, which always ends.
_INTERPOLATIONS = 16
# A try is at most this many times larger than the one before: the tokens of a unit are learned on short texts.
_GROWTH = 32
# The search ends when at most room / 65,536 tokens are left: to fill a million tokens to the last word takes ten tries of
# several seconds each.
_TOLERANCE = 65536


def fit(draft: Draft, encode: Encode, room: int) -> tuple[int, list[int]]:
    """Units and tokens of the longest prompt of at most ``room`` tokens: one more unit of haystack would not fit, or at most
    ``room // 65536`` tokens are left.

    Raises ValueError if the prompt with the least haystack does not fit.
    """
    least, best = draft.least, encode(draft.text(draft.least))
    if len(best) > room:
        raise ValueError(f"the least prompt has {counted(len(best), 'token')}, more than {room}")
    low, smallest = least, len(best)
    high: int | None = None
    over = 0  # tokens of ``high`` units beyond the room
    pull, fitted = 1.0, True
    for tries in itertools.count():
        left = room - len(best)
        if left <= room // _TOLERANCE or (high is not None and high - low == 1) or low > least + _GROWTH * room:
            return low, best  # the last: units that have no tokens
        if high is not None:
            # Interpolate between both ends.
            share = pull * left / (pull * left + over) if tries < _INTERPOLATIONS else 0.5
            guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        elif len(best) > smallest:
            per_unit = (len(best) - smallest) / (low - least)
            guess = min(low + int(left / per_unit) + 1, _GROWTH * low)
        else:
            guess = 2 * low + 8
        tokens = encode(draft.text(guess))
        fits = len(tokens) <= room
        # When one end moves again and again, look closer and closer to the other (the Illinois method).
        pull = 1.0 if fits != fitted else pull * 2 if fits else pull / 2
        fitted = fits
        if fits:
            low, best = guess, tokens
        else:
            high, over = guess, len(tokens) - room
    raise AssertionError("the search ends")
