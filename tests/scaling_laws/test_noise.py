"""The noise of the runs is estimated: many runs tell it, few lean on what is usual, and what is promised holds."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_laws.fitting import _noisy
from scaling_laws.ladder import _information_of_one
from scaling_laws.runs import read_runs
from scaling_laws.surface import NOISE
from scaling_laws.surface_fit import fit_surface, posterior
from tests.scaling_laws.data import best_loss, optimum, synthetic

CROSS = ((0.0, 0.0), (0.7, 0.0), (-0.7, 0.0), (0.0, 0.7), (0.0, -0.7))


def crosses(folder: Path, noise: float, seed: int) -> pd.DataFrame:
    """Five runs near the optimum of each of 12 groups, of which the loss is known but for ``noise``."""
    rng, rows = np.random.default_rng(seed), []
    for n in (5e7, 1e8, 2e8, 4e8):
        for d in (1e9, 4e9, 1.6e10):
            rate, batch = optimum(n, d)
            for u, v in CROSS:
                loss = best_loss(n, d) * np.exp(0.02 * u**2 + 0.02 * v**2)
                row = {"n_total": n, "tokens": d, "seq_len": 1, "learning_rate": rate * np.exp(u)}
                rows.append(row | {"batch_size": batch * np.exp(v), "loss": loss * np.exp(rng.normal(0, noise))})
    path = folder / f"{seed}.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return read_runs([path]).frame


@pytest.mark.parametrize("noise", [5e-3, 1e-2, 2e-2])
def test_many_runs_tell_their_noise(noise: float, tmp_path: Path) -> None:
    found = [fit_surface(crosses(tmp_path, noise, seed)).noise for seed in range(6)]
    assert float(np.mean(found)) == pytest.approx(noise, rel=0.25)


def test_it_is_never_less_than_usual(tmp_path: Path) -> None:
    assert fit_surface(crosses(tmp_path, 1e-4, 0)).noise == NOISE
    assert fit_surface(read_runs([synthetic(tmp_path / "runs.csv")]).frame).noise == NOISE


def test_the_promised_uncertainty_of_noisy_runs_is_about_right(tmp_path: Path) -> None:
    """How log lr* of a larger model varies with the noise, in promised deviations; for 0.15%, a fifth would be promised."""
    target, misses = (1.6e9, 1.6e9, 3.2e10), []
    for seed in range(30):
        found = posterior(crosses(tmp_path, 1e-2, seed), misfit=(1e-9, 1e-9))
        x = np.array([1, np.log(target[0] / 1e9), np.log(target[2] / 1e10), 0.0])
        deviation = np.sqrt(x @ found.covariance[:4, :4] @ x)
        misses.append((np.log(found.surface.optimum(*target)[0][0] / optimum(target[0], target[2])[0])) / deviation)
    assert 0.5 < float(np.std(misses)) < 1.3


def test_the_report_says_that_runs_are_noisy_and_a_ladder_expects_it(tmp_path: Path) -> None:
    noisy, usual = (fit_surface(crosses(tmp_path, noise, 0)) for noise in (2e-2, 1e-4))
    (note,) = _noisy(noisy)
    assert "where 0.15% is usual" in note and _noisy(usual) == []
    little, much = (_information_of_one(one, (1e8, 1e8, 1e9), CROSS, np.zeros(2))[0, 0] for one in (noisy, usual))
    assert little < 0.05 * much
