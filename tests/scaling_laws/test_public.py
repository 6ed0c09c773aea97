"""What correct fits find in the public sweeps (figures published with them, or found independently)."""

import time

import numpy as np
import pytest

from scaling_laws.fitting import fit_table
from scaling_laws.forms import points_of
from scaling_laws.loss_law import fit_loss
from scaling_laws.surface import fit_step_law, fit_surface, mean, nearest_run_excess, power_law
from tests.scaling_laws.data import public


def test_chinchilla_as_reanalysed() -> None:
    """arXiv 2404.10102: E 1.8172, exponents 0.3478 and 0.3658, without the five highest losses; with all points the
    exponent of D moves to 0.45. Eight starts, under a second."""
    frame = public("chinchilla_runs").frame
    kept = frame.sort_values("loss").iloc[:-5]
    begin = time.perf_counter()
    law = fit_loss(points_of(kept), kept["loss"].to_numpy())
    assert time.perf_counter() - begin < 5 and law.starts <= 8  # under a second on a quiet machine
    assert law.objective == pytest.approx(0.001018, abs=2e-6)
    assert [law.values[name] for name in ("e", "a", "b")] == pytest.approx([1.817, 0.347, 0.367], abs=0.002)
    assert law.spread < 1e-3
    everything = fit_loss(points_of(frame), frame["loss"].to_numpy())
    assert everything.values["b"] == pytest.approx(0.45, abs=0.01)


def test_step_law_baseline() -> None:
    """arXiv 2503.04715 publishes 1.79 N^-0.713 D^0.307 and 0.58 D^0.571; compared where the runs are, since scale and
    exponents trade against each other."""
    law = fit_step_law(public("dense_lr_batch_sweep").frame)
    rate, batch = power_law(law, "learning_rate"), power_law(law, "batch")
    assert (rate["n_total"], rate["tokens"]) == pytest.approx((-0.713, 0.307), abs=0.04)
    assert batch["n_total"] == 0 and batch["tokens"] == pytest.approx(0.571, abs=0.04)
    for n, d in ((1e8, 1e10), (3e8, 3e10)):
        found_rate, found_batch = law.optimum(n, n, d)
        assert found_rate[0] == pytest.approx(1.79 * n**-0.713 * d**0.307, rel=0.15)
        assert found_batch[0] == pytest.approx(0.58 * d**0.571, rel=0.15)


def test_the_surface_extrapolates_to_larger_models_better_than_step_law() -> None:
    frame = public("dense_lr_batch_sweep").frame
    small, large = frame[frame["n_total"] < 4e8], frame[frame["n_total"] >= 4e8]
    ours = mean(nearest_run_excess(fit_surface(small), large).values())
    baseline = mean(nearest_run_excess(fit_step_law(small), large).values())
    assert ours <= 0.0015 and ours < 0.6 * baseline


def test_a_sparsity_that_was_left_out() -> None:
    """Against using N_total, and N_active, as the N of a dense law."""
    frame = public("dense_lr_batch_sweep", "moe_lr_batch_sweep").frame
    sparsity = (frame["n_active"] / frame["n_total"]).round(2)
    errors: dict[str, list[float]] = {"both": [], "n_total": [], "n_active": []}
    for value in sorted(set(sparsity) - {1.0}):
        for how, found in errors.items():
            seen = frame if how == "both" else frame.assign(n_total=frame[how], n_active=frame[how])
            surface = fit_surface(seen[sparsity != value])
            found.append(mean(nearest_run_excess(surface, seen[sparsity == value]).values()))
    assert mean(errors["both"]) <= 0.0015 and max(errors["both"]) <= 0.0015
    assert mean(errors["both"]) < mean(errors["n_total"]) < mean(errors["n_active"])


@pytest.mark.slow
def test_a_thousand_resamples_of_chinchilla() -> None:
    table = public("chinchilla_runs")
    begin = time.perf_counter()
    fit = fit_table(table, samples=1000, seed=0, progress=lambda steps: steps)
    assert len(fit.loss_samples) >= 950 and time.perf_counter() - begin < 120  # 15 s on a quiet machine
    low, high = np.percentile([law.values["b"] for law in fit.loss_samples], [2.5, 97.5])
    assert fit.loss_law is not None and low < fit.loss_law.values["b"] < high
