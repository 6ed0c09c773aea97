"""Rows of sampled answers: a pipeline has a fixed number of them, so what is checked before a run must be enough."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_moe.training.responses import most_rows, rows_of


@given(st.integers(3, 60), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(["any", "long", "equal"]))
def test_answers_never_take_more_rows_than_was_said(length: int, parts: int, seed: int, kind: str) -> None:
    random = np.random.RandomState(seed)
    longest = max(1, length // parts - random.randint(0, 2))
    least = {"any": 1, "long": max(1, longest - 1), "equal": longest}[kind]
    lengths = random.randint(least, longest + 1, random.randint(1, 3000))
    rows = rows_of(lengths.tolist(), np.ones(len(lengths), bool), length, 1)
    assert len(rows) <= most_rows(len(lengths), longest, length)


@pytest.mark.parametrize(("answers", "longest", "rows"), [(1, 100, 1), (1024, 50, 512), (1024, 49, 513), (7, 30, 3)])
def test_a_window_of_rows_may_end_with_one_that_has_room(answers: int, longest: int, rows: int) -> None:
    found = rows_of([longest] * answers, np.ones(answers, bool), 100, 1)
    assert len(found) == rows <= most_rows(answers, longest, 100) <= rows + 1
