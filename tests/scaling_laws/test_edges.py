"""Where the optimum lies outside of the runs, the fit must place it on the side where losses fall."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_laws.fitting import _beyond, _doubtful
from scaling_laws.runs import _at_edges, read_runs
from scaling_laws.surface_fit import fit_surface

FALLING = Path(__file__).with_name("falling_to_small_batches.csv")  # 37 runs of benchmarks/ladder/third
GROUPS = ((1.5e4, 1.1e5), (1.5e4, 2.2e5), (1.5e4, 4.4e5), (5.8e4, 4.2e5), (1.3e5, 9.4e5))
STAR = ((0.0, 0.0), (-0.8, 0.0), (0.8, 0.0), (0.0, -0.8), (0.0, 0.8), (-0.8, -1.5), (0.8, -1.5))


def _around(u_best: float, v_best: float, noise: float, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Runs in a star in each of five groups, whose optimum is at (u_best, v_best) from the star's middle, in logs; and the
    middle of the last."""
    rng = np.random.default_rng(seed)
    rows, middle = [], np.zeros(2)
    for group, (n, d) in enumerate(GROUPS):
        middle = np.log([0.01 * (n / 1.5e4) ** -0.4, 1000 * (d / 2e5) ** 0.5])
        for point in STAR:
            a, b = point[0] - u_best, point[1] - v_best
            level = 1.5 + 0.3 / (n / 1e9) ** 0.15 + 0.3 / (d / 1e10) ** 0.15
            rate, batch = np.exp(middle + point)
            loss = level * np.exp(0.01 * (a * a + b * b - 0.6 * a * b) + rng.normal(0, noise))
            rows.append((n, 0.4 * n, d, rate, batch, loss, False, group))
    columns = ["n_total", "n_active", "tokens", "learning_rate", "batch_tokens", "loss", "diverged", "group"]
    return pd.DataFrame(rows, columns=columns), middle


@pytest.mark.parametrize(("u", "v", "noise", "seed"), [(2.0, 0.0, 0.01, 3), (0.0, -3.0, 0.01, 0), (-2.0, 0.0, 0.01, 0)])
def test_the_optimum_is_on_the_side_where_losses_fall(u: float, v: float, noise: float, seed: int) -> None:
    frame, middle = _around(u, v, noise, seed)
    last = frame.iloc[-1]
    found = np.log(fit_surface(frame).optimum(last["n_total"], last["n_active"], last["tokens"])).ravel() - middle
    assert found @ np.array([u, v]) > 1


def test_no_run_is_far_below_the_optimum() -> None:
    """Once the cubic followed losses that fall towards small batches: its optimum was at 30,000 tokens, 6% above them."""
    frame = read_runs([FALLING]).frame
    surface = fit_surface(frame)
    heights = np.log1p(
        surface.excess(
            frame["n_total"], frame["n_active"], frame["tokens"], frame["learning_rate"], frame["batch_tokens"]
        )
    )
    assert heights.min() > -2 * surface.noise
    groups = frame.groupby("group")
    best = frame.loc[groups["loss"].idxmin()]
    largest = best.nlargest(2, "n_active")  # in these, each smaller batch is better
    _, batch = surface.optimum(largest["n_total"], largest["n_active"], largest["tokens"])
    assert (batch < largest["batch_tokens"]).all()


def test_one_run_that_blew_up_by_accident_moves_the_optimum_little() -> None:
    """The middle of a group's runs, whose neighbors on all sides ended well. It once moved a learning rate five times."""
    frame, middle = _around(0.0, 0.0, 1e-3, 0)
    last = frame.iloc[-1]
    frame.loc[0, "diverged"] = True
    surface = fit_surface(frame)
    found = np.log(surface.optimum(last["n_total"], last["n_active"], last["tokens"])).ravel() - middle
    assert np.abs(found).max() < 0.3
    (note,) = _doubtful(surface, frame)
    assert "1 of 1 diverged run has settings" in note and "learning rate 0.01, batch 742 tokens" in note


def test_runs_that_blew_up_where_losses_rise_are_believed() -> None:
    frame, _ = _around(-0.8, 0.0, 1e-3, 0)
    frame.loc[
        frame["learning_rate"] > 1.5 * frame.groupby("group")["learning_rate"].transform("median"), "diverged"
    ] = True
    surface = fit_surface(frame)
    blown = frame[frame["diverged"]]
    place = (blown[c] for c in ("n_total", "n_active", "tokens", "learning_rate", "batch_tokens"))
    assert len(blown) == 10 and (surface.excess(*place) > 0.04).all() and _doubtful(surface, frame) == []


def test_an_optimum_beyond_a_cross_is_told() -> None:
    """Off in both, so that the best run of a group is at an edge of one or the other by accident."""
    frame, _ = _around(1.3, 1.3, 3e-3, 1)
    crosses = frame[frame.groupby("group").cumcount() < 5]
    notes = _beyond(fit_surface(crosses), crosses, _at_edges(crosses))
    notes += _at_edges(crosses)
    for what in ("learning rate", "batch size"):
        assert sum(what in note and "add runs with larger ones" in note for note in notes) == 1, notes
    inside, _ = _around(0.0, 0.0, 1e-3, 1)
    assert _beyond(fit_surface(inside), inside, []) == []
