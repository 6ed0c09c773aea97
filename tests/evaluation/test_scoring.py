"""Scores against those of RULER's own functions, on the same answers."""

from random import Random

import pytest

from qwen_moe.evaluation.scoring import clean, number_equals, string_match_all, string_match_part


def drawn(seed: int) -> tuple[list[str], list[list[str]]]:
    """Predictions and answers of few letters, so that answers are often found; 1 to 30 samples with 1 to 6 answers."""
    rng = Random(seed)
    count = rng.randint(1, 30)
    predictions = ["".join(rng.choices("aAbB1 É", k=rng.randint(0, 12))) for _ in range(count)]
    references = [
        ["".join(rng.choices("aAbB1é", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 6))] for _ in range(count)
    ]
    return predictions, references


# string_match_all and string_match_part of scripts/eval/synthetic/constants.py (github.com/NVIDIA/RULER, commit c3f5e3b),
# called with `drawn(seed)` for seeds 0 to 15.
RULERS = (
    (38.87, 67.86), (0.0, 0.0), (21.55, 53.57), (19.58, 37.5), (52.08, 62.5), (28.83, 50.0), (36.22, 69.23),
    (32.12, 45.45), (30.42, 75.0), (34.67, 53.33), (23.33, 36.84), (22.11, 53.33), (41.67, 68.75), (35.74, 77.78),
    (47.5, 75.0), (8.33, 28.57),
)  # fmt: skip


def test_scores_equal_rulers() -> None:
    for seed, scores in enumerate(RULERS):
        predictions, references = drawn(seed)
        assert (string_match_all(predictions, references), string_match_part(predictions, references)) == scores


def test_scores_of_a_known_case() -> None:
    predictions = ["The numbers are 12 and 345.", "nothing", "PARIS"]
    references = [["12", "345", "6"], ["1"], ["paris", "Rome"]]
    assert string_match_all(predictions, references) == 38.89  # (2/3 + 0 + 1/2) / 3
    assert string_match_part(predictions, references) == 66.67


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (" 12345. What is", 1), ("12345", 1), ("is 12345", 1), ("123456", 0), ("1234", 0), (" 1 2345", 0), ("99 12345", 0),
        ("", 0), ("the", 0), ("012345", 0),
    ],
)  # fmt: skip
def test_the_first_number_is_the_key(completion: str, score: float) -> None:
    assert number_equals(completion, ["12345"]) == score


def test_completions_are_cleaned_as_ruler_does() -> None:
    assert clean(" \x00a\tb\x1f ") == "a\nb"
