"""A table with few groups: its intervals are draws, and hold the truth about as often as they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_laws.draws import draws
from scaling_laws.fitting import fit_table
from scaling_laws.forms import points
from scaling_laws.laboratories import laboratory_prior
from scaling_laws.recommend import Request, _with_excess, recommend
from scaling_laws.report import report_text
from scaling_laws.runs import read_runs
from scaling_laws.surface_fit import fit_surface
from scaling_laws.validation import law_of
from tests.scaling_laws.data import best_loss, optimum, synthetic


def test_as_many_groups_as_a_loss_law_has_parameters_give_intervals(tmp_path: Path) -> None:
    """Resamples of 5 groups hardly ever determine a law of 5 parameters."""
    table = read_runs([synthetic(tmp_path / "runs.csv")])
    frame = table.frame
    groups = frame.groupby("group")[["n_total", "tokens"]].first().sort_values(["tokens", "n_total"])
    chosen = groups.index[:: max(1, len(groups) // 5)][:5]
    table = replace(table, frame=frame[frame["group"].isin(chosen)].reset_index(drop=True))
    fit = fit_table(table, samples=30, seed=0, progress=lambda steps: steps)
    assert fit.loss_law is not None and fit.loss_law.form == "chinchilla"
    assert fit.drawn and len(fit.loss_samples) == len(fit.surface_samples) == 30
    assert "draws of what the runs and the prior tell" in report_text(fit, [])
    found = recommend(fit, Request(n_total=2e8, tokens=4e9, seq_len=1024, accept_extrapolation=True))
    assert None not in found["intervals"].values()
    low, high = found["intervals"]["predicted_loss"]
    assert low < found["predicted_loss"] < high
    # A batch is wide if it costs more than the best one, whose own expected cost may be above 0.1%.
    assert found["widest_batch_tokens"] >= found["batch_size_tokens"] * 0.99


def test_the_predicted_loss_and_its_interval_are_of_the_recommended_run() -> None:
    """Both are above the loss at the optimum by the expected excess, in each sample or on average."""
    excesses = np.array([0.01, 0.03])
    assert _with_excess([2.0, 3.0], excesses) == pytest.approx([2.02, 3.09])
    assert _with_excess([2.0], excesses) == pytest.approx([2.04])


def test_the_interval_of_a_loss_from_six_groups_holds_it() -> None:
    """Losses alone, of a law that is known but for 0.3% between groups, predicted at 30 times the compute. Of refits to
    resampled groups, half would hold it."""
    n, d = (np.array(side) for side in zip(*[(n, n * r) for n in (1.2e7, 3e7, 7e7) for r in (20, 80)], strict=True))
    target, held = points(3.9e8, 3.9e8, 8e9), []
    for seed in range(5):
        loss = [best_loss(*one) for one in zip(n, d, strict=True)]
        loss *= np.exp(np.random.default_rng(seed).normal(0, 3e-3, 6))
        columns = {"n_total": n, "n_active": n, "tokens": d, "loss": loss, "diverged": False, "group": range(6)}
        frame = pd.DataFrame(columns)
        _, laws = draws(frame, (None, law_of(frame, "chinchilla")), laboratory_prior(), range(24), seed)
        low, high = np.percentile([law.at(target)[0] for law in laws], [2.5, 97.5])
        held.append(low < best_loss(3.9e8, 8e9) < high)
    assert np.mean(held) > 0.7


def test_the_best_learning_rate_and_batch_lie_in_their_intervals() -> None:
    """Crosses of five runs with noise, of which the middle is 0.4 off in both."""
    held = []
    for seed in range(5):
        rng, rows = np.random.default_rng(seed), []
        for group, (n, r) in enumerate([(n, r) for n in (1.2e7, 3e7, 7e7) for r in (20, 80)]):
            for u, v in ((0, 0), (0.8, 0), (-0.8, 0), (0, 0.8), (0, -0.8)):
                a, b = u + rng.choice([-0.4, 0.4]), v + 0.4
                loss = best_loss(n, n * r) * np.exp(0.01 * (a * a + b * b) + rng.normal(0, 2e-3))
                rate, batch = optimum(n, n * r)
                rows.append((n, n, n * r, rate * np.exp(a), batch * np.exp(b), loss, False, group))
        names = ["n_total", "n_active", "tokens", "learning_rate", "batch_tokens", "loss", "diverged", "group"]
        frame = pd.DataFrame(rows, columns=names)
        surfaces, _ = draws(frame, (fit_surface(frame), None), laboratory_prior(), range(100), seed)
        target = 1.6e9, 1.6e9, 3.2e10
        told = np.percentile([np.ravel(surface.optimum(*target)) for surface in surfaces], [2.5, 97.5], axis=0)
        held.append((told[0] < optimum(target[0], target[2])) & (optimum(target[0], target[2]) < told[1]))
    assert np.mean(held) > 0.85


@pytest.mark.parametrize(("surfaces", "laws", "text"), [(20, 5, "only 20 of 30"), (30, 5, "loss law"), (30, 30, "")])
def test_what_is_said_of_resamples_that_were_not_fitted(surfaces: int, laws: int, text: str) -> None:
    from scaling_laws.fitting import _not_fitted

    notes = _not_fitted(30, surfaces, laws)
    assert text in "; ".join(notes) and bool(notes) == bool(text)
