"""What `verify` says of reports that are wrong in one place."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from qwen_moe.verify.compare import compare
from qwen_moe.verify.ranks import Report
from qwen_moe.verify.reference import Trajectory

FIGURES = {"loss": 2.0, "balance loss": 1.0, "z-loss": 0.5, "gradient norm": 3.0}


def whole() -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor([4.0], dtype=torch.float64)}


def reference() -> Trajectory:
    return Trajectory(
        figures=[dict(FIGURES), dict(FIGURES)],
        counts=[None, None],
        gradients=[whole(), whole()],
        parameters=whole(),
        biases={},
        evaluated=2.5,
    )


def report() -> Report:
    def pieces() -> list[tuple[str, list[int], torch.Tensor]]:
        return [(name, [0], tensor) for name, tensor in whole().items()]

    return Report([dict(FIGURES), dict(FIGURES)], [None, None], [pieces(), pieces()], pieces(), {}, 2.5)


def test_equal_reports_are_equal() -> None:
    found = compare([report(), report()], reference())
    assert found.equal and found.largest == 0


PLACES: dict[str, Callable[[Report, float], None]] = {
    "a loss": lambda r, x: r.figures[0].update(loss=x),
    "a z-loss": lambda r, x: r.figures[0].update({"z-loss": x}),
    "a gradient norm": lambda r, x: r.figures[0].update({"gradient norm": x}),
    "a gradient": lambda r, x: r.gradients[0][0][2].fill_(x),
    "a parameter": lambda r, x: r.parameters[0][2].fill_(x),
    "an evaluated loss": lambda r, x: setattr(r, "evaluated", x),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, 7.0])
@pytest.mark.parametrize("place", PLACES)
def test_one_wrong_value_before_right_ones_is_seen(place: str, value: float) -> None:
    wrong = copy.deepcopy(report())
    PLACES[place](wrong, value)
    found = compare([wrong, report()], reference())
    assert not found.equal and found.largest > 1e-3


def test_gradients_that_are_all_zero_can_be_compared() -> None:
    """Where every ratio is clipped, no token has a gradient."""
    expected, zeros = reference(), copy.deepcopy(report())
    for step in (0, 1):
        expected.gradients[step] = {name: torch.zeros_like(tensor) for name, tensor in whole().items()}
        for _, _, held in zeros.gradients[step]:
            held.zero_()
    assert compare([zeros], expected).equal
    assert compare([report()], expected).gradients == 4.0
