"""The search for the size of a haystack, against trying every size."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_moe.evaluation.tasks.task import Draft, fit


@given(
    least=st.integers(0, 20),
    template=st.integers(0, 50),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    spare=st.integers(0, 3000),
)
def test_the_size_is_the_largest_that_fits(least: int, template: int, steps: list[int], spare: int) -> None:
    """Against trying every size; units may have no tokens of their own."""
    steps = [*steps, 1]

    def tokens(count: int) -> int:
        rounds, rest = divmod(count, len(steps))
        return template + rounds * sum(steps) + sum(steps[:rest])

    calls: list[int] = []

    def text(count: int) -> str:
        calls.append(count)
        return "x" * tokens(count)

    draft = Draft(text=text, answers=("a",), least=least)
    room = tokens(least) + spare
    expected = least
    while tokens(expected + 1) <= room:
        expected += 1
    size, found = fit(draft, list, room)  # type: ignore[arg-type]
    assert len(found) == tokens(size) == tokens(expected)
    assert len(calls) <= 35 and min(calls) >= least
    with pytest.raises(ValueError, match="the least prompt"):
        fit(draft, list, tokens(least) - 1)  # type: ignore[arg-type]


def test_long_prompts_are_found_in_few_tries() -> None:
    """Text of irregular words: within 1/65,536 of the room, and almost all tries are much shorter than the room."""
    rng = Random(0)
    words = [rng.choice((1, 1, 2, 3, 9)) for _ in range(700_000)]
    total = np.concatenate([[0], np.cumsum(words)])
    for room in (100_000, 1_048_576):
        calls: list[int] = []

        def encode(text: str, calls: list[int] = calls) -> list[int]:
            calls.append(90 + int(total[len(text)]))
            return [0] * calls[-1]

        _, found = fit(Draft(text=lambda count: "x" * count, answers=("a",), least=1), encode, room)
        assert 0 <= room - len(found) <= room // 65536
        assert sum(count > room / 2 for count in calls) <= 5 and max(calls) < 1.1 * room


def test_units_without_tokens_end_the_search() -> None:
    assert len(fit(Draft(text=lambda count: "abc", answers=("a",), least=1), list, 100)[1]) == 3  # type: ignore[arg-type]
