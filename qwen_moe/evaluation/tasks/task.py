"""What a task is, and how a prompt gets its length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

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


# Interpolation finds the size in about four tries; after this many, halving takes over, which always ends.
_INTERPOLATIONS = 12


def fit(draft: Draft, encode: Encode, room: int) -> tuple[int, list[int]]:
    """Units and tokens of the longest prompt of at most ``room`` tokens: one more unit of haystack would not fit.

    Raises ValueError if the prompt with the least haystack does not fit.
    """
    low, best = draft.least, encode(draft.text(draft.least))
    if len(best) > room:
        raise ValueError(f"the least prompt has {len(best)} tokens, more than {room}")
    high: int | None = None
    slope, tries = 0.0, 0  # tokens of a unit, by the last two sizes
    while high is None or high - low > 1:
        guess = _guess(low, high, room - len(best), slope, tries)
        tokens = encode(draft.text(guess))
        slope = (len(tokens) - len(best)) / (guess - low)
        if len(tokens) <= room:
            low, best = guess, tokens
        else:
            high = guess
        tries += 1
    return low, best


def _guess(low: int, high: int | None, left: int, slope: float, tries: int) -> int:
    """A size above ``low``, which fits, and below ``high``, which does not. ``left``: tokens that may still be added."""
    if tries < _INTERPOLATIONS:
        guess = low + int(left / slope) if slope > 0 else 2 * low + 1
        # Half of the tries that interpolate look one further, so that both ends close in.
        guess += tries % 2
    else:
        guess = 2 * low + 1 if high is None else (low + high) // 2
    return max(low + 1, guess if high is None else min(guess, high - 1))
