"""Scores of completions, as RULER computes them (github.com/NVIDIA/RULER, scripts/eval/synthetic/constants.py)."""

import re
from collections.abc import Callable, Sequence

Score = Callable[[str, Sequence[str]], float]

_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+")


def clean(completion: str) -> str:
    """The completion as RULER's evaluate.py compares it: control characters become line breaks, and the ends are trimmed."""
    return _CONTROL.sub("\n", completion.strip()).strip()


def share_found(prediction: str, answers: Sequence[str]) -> float:
    """The share of ``answers`` that occur in ``prediction``, upper or lower case."""
    return sum(1.0 if answer.lower() in prediction.lower() else 0.0 for answer in answers) / len(answers)


def any_found(prediction: str, answers: Sequence[str]) -> float:
    """1 if one of ``answers`` occurs in ``prediction``, upper or lower case, and 0 otherwise."""
    return max(1.0 if answer.lower() in prediction.lower() else 0.0 for answer in answers)


def number_equals(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first number of ``prediction`` is the answer, digit by digit, and 0 otherwise."""
    found = _NUMBER.search(prediction)
    return 1.0 if found is not None and found.group() == answers[0] else 0.0


def percent(scores: Sequence[float]) -> float:
    """The mean of scores from 0 to 1 in percent, with two decimals as in RULER."""
    return round(sum(scores) / len(scores) * 100, 2)


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """RULER's score of all tasks but question answering, in percent."""
    return percent(
        [share_found(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)]
    )


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """RULER's score of question answering, in percent."""
    return percent(
        [any_found(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)]
    )
