"""A table whose best runs have the smallest or largest setting that was tried says so: its optimum is extrapolated."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_laws.runs import read_runs

GRID = (-0.8, 0.0, 0.8)  # log of setting over the middle of the grid


def notes(path: Path, optima: Sequence[tuple[float, float]]) -> list[str]:
    """Of a 3 x 3 grid for each size, whose optimum is at (log learning rate, log batch) from the middle."""
    rows = []
    for place, (best_u, best_v) in enumerate(optima):
        for u in GRID:
            for v in GRID:
                loss = 3 * np.exp(0.01 * (u - best_u) ** 2 + 0.01 * (v - best_v) ** 2)
                rows.append(
                    {"n_total": 1e8 * (1 + place), "tokens": 2e9, "seq_len": 1024, "learning_rate": 1e-3 * np.exp(u),
                     "batch_size": 100 * np.exp(v), "loss": loss}
                )  # fmt: skip
    pd.DataFrame(rows).to_csv(path, index=False)
    return read_runs([path]).warnings


def test_optima_inside_the_grid_need_no_note(tmp_path: Path) -> None:
    assert notes(tmp_path / "runs.csv", [(0.0, 0.0), (0.1, -0.2), (-2.0, 0.2), (0.0, 2.0)]) == []


@pytest.mark.parametrize(
    "optimum, told, side",
    [
        ((-2.0, 0.0), "the smallest learning rate", "smaller"),
        ((2.0, 0.0), "the largest learning rate", "larger"),
        ((0.0, -2.0), "the smallest batch size", "smaller"),
        ((0.0, 2.0), "the largest batch size", "larger"),
    ],
)
def test_optima_beyond_the_grid_are_told(optimum: tuple[float, float], told: str, side: str, tmp_path: Path) -> None:
    (note,) = notes(tmp_path / "runs.csv", [optimum, optimum, (0.0, 0.0), optimum])
    assert note.startswith(f"in 3 of 4 groups the best run has {told} that was tried")
    assert note.endswith(f"add runs with {side} ones")
    assert notes(tmp_path / "two.csv", [optimum, optimum]) == []  # two groups may do so by chance
