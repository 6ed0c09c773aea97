"""A table with as many groups as a loss law has parameters: resamples still tell learning rate and batch size."""

from dataclasses import replace
from pathlib import Path

import pytest

from scaling_laws.fitting import fit_table
from scaling_laws.recommend import Request, recommend
from scaling_laws.runs import read_runs
from tests.scaling_laws.data import synthetic


def test_resamples_too_small_for_a_loss_law_still_give_surfaces(tmp_path: Path) -> None:
    table = read_runs([synthetic(tmp_path / "runs.csv")])
    frame = table.frame
    groups = frame.groupby("group")[["n_total", "tokens"]].first().sort_values(["tokens", "n_total"])
    chosen = groups.index[:: max(1, len(groups) // 5)][:5]
    table = replace(table, frame=frame[frame["group"].isin(chosen)].reset_index(drop=True))
    fit = fit_table(table, samples=30, seed=0, progress=lambda steps: steps)
    assert fit.loss_law is not None and fit.loss_law.form == "chinchilla"
    assert len(fit.loss_samples) < 24 <= len(fit.surface_samples)
    assert any("the loss law could be fitted to only" in note for note in fit.warnings)
    found = recommend(fit, Request(n_total=2e8, tokens=4e9, seq_len=1024, accept_extrapolation=True))
    assert found["intervals"]["learning_rate"] is not None and found["intervals"]["batch_size_tokens"] is not None
    # A batch is wide if it costs more than the best one, whose own expected cost may be above 0.1%.
    assert found["widest_batch_tokens"] >= found["batch_size_tokens"] * 0.99


@pytest.mark.parametrize(("surfaces", "laws", "text"), [(20, 5, "only 20 of 30"), (30, 5, "loss law"), (30, 30, "")])
def test_what_is_said_of_resamples_that_were_not_fitted(surfaces: int, laws: int, text: str) -> None:
    from scaling_laws.fitting import _not_fitted

    notes = _not_fitted(30, surfaces, laws)
    assert text in "; ".join(notes) and bool(notes) == bool(text)
