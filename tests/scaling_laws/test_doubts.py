"""What is said of results that the runs do not support: optima beyond what was tried, and losses beyond a law that fails."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_laws.errors import InputError
from scaling_laws.fitting import Fit, fit_table
from scaling_laws.plots import draw_isoflop
from scaling_laws.recommend import Request, recommend
from scaling_laws.runs import read_runs
from tests.scaling_laws.data import synthetic

GRID = (-0.8, 0.0, 0.8)  # log of setting over the middle of the grid


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    table = read_runs([synthetic(tmp_path_factory.mktemp("runs") / "runs.csv")])
    return fit_table(table, samples=0, seed=0, progress=lambda steps: steps)


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


def test_runs_that_end_alike_are_no_optimum_at_the_edge(tmp_path: Path) -> None:
    """Losses of two decimals: where the least loss is that of several runs, the first is no better than the others."""
    path = tmp_path / "runs.csv"
    notes(path, [(0.0, 0.0)] * 4)
    frame = pd.read_csv(path)
    frame["loss"] = frame["loss"].clip(lower=3.03)  # flat but for the corners
    frame.to_csv(path, index=False)
    assert frame["loss"].nunique() > 1 and (frame["loss"] == 3.03).sum() > 4 * len(GRID)
    assert read_runs([path]).warnings == []


def test_a_fit_without_a_best_size_is_drawn_but_not_asked(fit: Fit, tmp_path: Path) -> None:
    """A law whose tokens do not matter: every larger model is better."""
    assert fit.loss_law is not None
    fit = replace(fit, loss_law=replace(fit.loss_law, values=fit.loss_law.values | {"big_b": 0.0}))
    with pytest.raises(InputError, match=r"no compute-optimal size for 1e.19 FLOPs"):
        recommend(fit, Request(flops=1e19, seq_len=1024))
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame
    assert draw_isoflop(fit, frame, tmp_path / "isoflop.png").stat().st_size > 0


def test_a_loss_law_that_misses_larger_runs_is_doubted(fit: Fit) -> None:
    """Only misses beyond the compute that was fitted count: smaller runs may be off for reasons that larger ones lack."""
    request = Request(n_total=1.6e9, tokens=6.4e10, seq_len=1024)
    assert not any("law is off" in warning for warning in recommend(fit, request)["warnings"])
    below = {"held_out": "sparsity 0.5", "groups": 3, "compute_ratio": 0.2, "loss_error": 0.5}
    beyond = {"held_out": "largest N (4e+08)", "groups": 3, "compute_ratio": 4.9, "loss_error": 0.0918}
    unknown = {"held_out": "35% largest compute", "groups": 1, "compute_ratio": 2.0, "no_loss_error": "too few"}
    doubted = replace(fit, validation=[below, beyond, unknown])
    found = [warning for warning in recommend(doubted, request)["warnings"] if "law is off" in warning]
    assert len(found) == 1 and "4.9 times the compute" in found[0] and "off by 9.2%" in found[0]
    assert not any(
        "law is off" in warning for warning in recommend(replace(fit, validation=[below]), request)["warnings"]
    )


def test_what_the_loss_law_does_not_use_is_told(fit: Fit) -> None:
    """And what it does use counts for the compute-optimal sizes, too."""
    asked = Request(n_total=4e8, tokens=1e10, seq_len=1024, granularity=8)

    def told(fit: Fit, **changes: float) -> str:
        return " ".join(recommend(fit, replace(asked, **changes))["warnings"])

    assert fit.loss_law is not None and fit.loss_law.form == "chinchilla"
    assert "--granularity 8 changes nothing" in told(fit) and "unique" not in told(fit, unique_tokens=1e10)
    assert "--unique-tokens 1e+08 changes nothing" in told(fit, unique_tokens=1e8)
    values = fit.loss_law.values | {"big_f": 0.3, "f": 0.6}
    fit = replace(fit, loss_law=replace(fit.loss_law, form="krajewski", values=values))
    assert "granularity" not in told(fit)
    request = replace(asked, n_total=None, tokens=None, flops=1e19)
    found = recommend(fit, request)
    assert found["shapes"][0]["loss"] * (1 + found["predicted_excess_loss"]) == pytest.approx(found["predicted_loss"])
    assert recommend(fit, replace(request, granularity=1))["n_total"] > 1.1 * found["n_total"]
