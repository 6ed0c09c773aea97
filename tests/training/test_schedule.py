"""Learning rates against hand-computed values."""

import math
from typing import Any

import pytest

from qwen_moe.config import RunConfig
from qwen_moe.training.schedule import learning_rate
from tests.training.test_step import SEQ, make_config

STEP = 8 * SEQ


def config(steps: int, **schedule: Any) -> RunConfig:
    return make_config(
        training__train_tokens=steps * STEP,
        optimizer__learning_rate=1.0,
        **{f"schedule__{key}": value for key, value in schedule.items()},
    )


def rates(c: RunConfig) -> list[float]:
    return [learning_rate(c, step) for step in range(c.train_steps)]


def test_cosine() -> None:
    expected = [0.25, 0.5, 0.75, 1.0]
    expected += [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    c = config(12, kind="cosine", warmup_tokens=4 * STEP, min_learning_rate=0.1)
    assert rates(c) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("sqrt", [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_wsd(shape: str, decay: list[float]) -> None:
    c = config(10, kind="wsd", warmup_tokens=2 * STEP, decay_tokens=4 * STEP, decay_shape=shape)
    assert rates(c) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *decay])


def test_constant() -> None:
    assert rates(config(5, kind="constant")) == [1.0] * 5


def test_no_step_is_wasted_at_zero_and_none_is_above_the_peak() -> None:
    for kind in ({"kind": "cosine"}, {"kind": "wsd", "decay_tokens": 7 * STEP + 5}):
        c = config(50, warmup_tokens=3 * STEP + 17, **kind)
        assert all(0 < rate <= 1 for rate in rates(c))


def test_the_last_step_may_be_cut_short() -> None:
    c = make_config(training__train_tokens=2 * STEP + 1)
    assert c.train_steps == 3
