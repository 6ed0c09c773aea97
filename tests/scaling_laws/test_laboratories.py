"""The prior from published sweeps: what it is made of, how much it counts, and what a fit says about it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qwen_moe.cli import main
from scaling_laws.errors import InputError
from scaling_laws.fitting import _drawn, load_fit
from scaling_laws.laboratories import BETWEEN, REPORTS, laboratory_prior
from scaling_laws.runs import read_runs
from scaling_laws.surface import Surface, deepseek_law, step_law_as_published
from scaling_laws.surface_fit import _begin, _problem, fit_surface
from scaling_laws.validation import _parts
from tests.scaling_laws.data import LAWS, optimum, synthetic

N, D = 1e9, 1e10  # the reference


@pytest.mark.parametrize(("name", "law"), [("Step Law", step_law_as_published()), ("DeepSeek LLM", deepseek_law())])
def test_reports_repeat_the_published_laws(name: str, law: Surface) -> None:
    (report,) = (report for report in REPORTS if report.laboratory == name)
    at, both_doubled = law.optimum(N, N, D), law.optimum(2 * N, 2 * N, 2 * D)
    for reported, here, there in zip((report.learning_rate, report.batch), at, both_doubled, strict=True):
        assert reported["value"] == pytest.approx(here[0], rel=0.01)
        growth = reported["compute"] if "compute" in reported else reported["n_total"] + reported["tokens"]
        assert growth == pytest.approx(np.log2(there[0] / here[0]), abs=1e-3)


def test_the_prior_is_the_conditional_gaussian_of_one_more_laboratory() -> None:
    """Independently: laboratories' laws and the new one as one large Gaussian around a mean that is nearly unknown."""
    mean, covariance = laboratory_prior().learning_rate
    terms = ("value", "n_total", "tokens", "sparsity")
    reports = [report.learning_rate for report in REPORTS if report.learning_rate]
    spread, vague = np.diag(np.square(BETWEEN["learning_rate"])), 1e4 * np.eye(4)
    size = 4 * (len(reports) + 1)
    joint = np.kron(np.ones((len(reports) + 1, len(reports) + 1)), vague) + np.kron(np.eye(len(reports) + 1), spread)
    rows, values = [], []
    for place, report in enumerate(reports):
        for name, value in report.items():
            row = np.zeros(size)
            for term in ("n_total", "tokens") if name == "compute" else (name,):
                row[4 * place + terms.index(term)] = 1.0
            rows.append(row)
            values.append(np.log(value) if name == "value" else value)
    seen, new = np.array(rows), np.eye(size)[-4:]
    gain = new @ joint @ seen.T @ np.linalg.inv(seen @ joint @ seen.T)
    assert mean == pytest.approx(gain @ np.array(values), abs=1e-3)
    assert covariance == pytest.approx(new @ joint @ new.T - gain @ seen @ joint @ new.T, abs=1e-3)


def test_laboratories_can_be_left_out() -> None:
    whole, others = laboratory_prior(), laboratory_prior(["Step Law"])
    assert set(whole.laboratories) - set(others.laboratories) == {"Step Law"}
    assert whole.learning_rate[0][1] < others.learning_rate[0][1]  # Step Law's exponent of N is among the lowest
    assert others.learning_rate[0][3] == 0 and others.learning_rate[1][3, 3] >= BETWEEN["learning_rate"][3] ** 2
    with pytest.raises(InputError, match="--without-laboratory Setp Law: expected one of Step Law, DeepSeek LLM"):
        laboratory_prior(["Setp Law"])
    with pytest.raises(InputError, match="leaves no published law for the learning rate"):
        laboratory_prior([report.laboratory for report in REPORTS if report.learning_rate])


def test_the_jacobian_is_that_of_the_residuals(tmp_path: Path) -> None:
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame.sample(40, random_state=0)
    frame = frame.assign(n_active=frame["n_total"] * np.where(frame["tokens"] > 2e9, 0.25, 0.5))
    problem = _problem(frame.iloc[:30], frame.iloc[30:], laboratory_prior())
    rng = np.random.default_rng(0)
    z = _begin(problem, None) + rng.normal(0, 0.3, len(problem.mean))
    z[14] -= 4  # a cubic that falls below the optimum
    given = rng.uniform(1e4, 4e5, 30), 4e-3, 2e-3
    low = problem.too_low(problem.parameters(z), 2e-3)[0] > 0
    assert low[:30].any() and low[30:].any()
    exact = problem.jacobian(z, *given)
    for place, step in enumerate(1e-6 * np.eye(len(z))):
        slope = (problem.residuals(z + step, *given) - problem.residuals(z - step, *given)) / 2e-6
        assert exact[:, place] == pytest.approx(slope, rel=1e-5, abs=1e-5 * np.abs(exact).max())


def test_scattered_runs_tell_the_optimum(tmp_path: Path) -> None:
    """Two runs of each of the twelve groups, none of which alone tells an optimum; the prior is off by a factor of 4."""
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame
    truth = np.log(optimum(2e8, 4e9))
    misses = []
    for seed in range(8):
        pairs = frame.groupby("group").sample(2, random_state=seed)
        found = np.log(np.array(fit_surface(pairs).optimum(2e8, 2e8, 4e9))[:, 0])
        misses.append(np.abs(found - truth))
    prior = laboratory_prior()
    x = np.array([1.0, np.log(2e8 / N), np.log(4e9 / D), 0.0])
    before = np.abs([x @ prior.learning_rate[0] - truth[0], x @ prior.batch[0] - truth[1]])
    assert np.mean(misses, axis=0).max() < 0.2 and before.max() > 1.4


def test_the_prior_counts_less_with_every_run(tmp_path: Path) -> None:
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame
    shares, misses = [], []
    for runs in (12, 48, 192, len(frame)):
        found = fit_surface(frame.sample(runs, random_state=1))
        shares.append(found.prior_share["learning_rate"][1])
        misses.append(abs(found.learning_rate[1] - LAWS["rate"][1]))
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.3 and shares[-1] < 0.05
    assert misses[-1] < 0.05


def test_a_prior_that_is_wrong_by_far_does_not_hold_a_large_table(tmp_path: Path) -> None:
    """The learning rates of the table are 20 times those that laboratories publish."""
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame
    frame["learning_rate"] *= 20
    rate, batch = fit_surface(frame).optimum(4e8, 4e8, 1.6e10)
    truth = optimum(4e8, 1.6e10)
    assert (rate[0] / 20, batch[0]) == pytest.approx(truth, rel=0.1)


def test_without_the_prior_only_what_the_runs_do_not_tell_comes_from_it(tmp_path: Path) -> None:
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame.sample(40, random_state=2)
    with_it, without = (fit_surface(frame, prior=laboratory_prior(removed=removed)) for removed in (False, True))
    for law in ("learning_rate", "batch"):
        assert max(without.prior_share[law][:3]) < 0.01 < max(with_it.prior_share[law][:3])
        assert without.prior_share[law][3] > 0.99  # the runs have one sparsity
    assert without.held == ["sparsity"]


def test_refits_of_an_exponent_that_the_runs_do_not_tell_vary_as_laboratories_do(tmp_path: Path) -> None:
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame
    one = frame[frame["n_total"] == 2e8].sample(30, random_state=0)
    prior = laboratory_prior()
    draws = _drawn(prior, seed=0)
    exponents = [fit_surface(one, prior=next(draws)).learning_rate[1] for _ in range(40)]
    assert np.std(exponents) == pytest.approx(np.sqrt(prior.learning_rate[1][1, 1]), rel=0.3)


@pytest.mark.parametrize("few", [30, 0])
def test_what_is_assumed_is_said_and_not_given_an_interval(
    few: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table with one size tells nothing about the effect of size. Its intervals are draws, or refits."""
    monkeypatch.setattr("scaling_laws.fitting.FEW_GROUPS", few)
    table = pd.read_csv(synthetic(tmp_path / "all.csv"))
    table[table["n_total"] == 2e8].to_csv(tmp_path / "runs.csv", index=False)
    arguments = ["scaling", "fit", str(tmp_path / "runs.csv"), "--output", str(tmp_path / "fit"), "--samples", "20"]
    assert main([*arguments, "--without-laboratory", "Step Law"]) == 0
    page = capsys.readouterr().out
    assert "· D^" in page and "N_total^-0.7" in page and "(assumed, +- 0.23 between laboratories)" in page
    assert "prior used: DeepSeek LLM, Lingle" in page and "(N_active/N_total) 100%" in page
    asked = ["scaling", "recommend", str(tmp_path / "fit"), "--n-total", "4e8", "--tokens", "8e9", "--seq-len", "1024"]
    assert main([*asked, "--accept-extrapolation", "--json"]) == 0
    prior = json.loads(capsys.readouterr().out)["prior"]
    assert prior["assumed"]["learning_rate.n_total"]["spread"] == pytest.approx(0.23, abs=0.01)
    assert "learning_rate.tokens" not in prior["assumed"] and prior["removed"] is False
    effects = [sample.learning_rate[3] for sample in load_fit(tmp_path / "fit").surface_samples]
    assert np.std(effects) > 0.2  # they vary in what is assumed as laboratories do
    assert main([*asked, "--accept-extrapolation"]) == 0
    assert "assumed: learning rate ~ N_total^-0.7" in capsys.readouterr().out
    assert main([*arguments, "--no-prior"]) == 0
    assert "prior removed, except for what the runs do not tell: Step Law, DeepSeek" in capsys.readouterr().out


def test_models_of_one_sparsity_do_not_tell_its_effect(tmp_path: Path) -> None:
    """Their shares of activated parameters differ by a few percent. Without the prior, a fit once found N_active^7."""
    table = pd.read_csv(synthetic(tmp_path / "all.csv", noise=1e-2))
    share = 0.36 + 0.01 * (table["n_total"] < 2e8)
    table.assign(n_active=share * table["n_total"]).to_csv(tmp_path / "runs.csv", index=False)
    frame = read_runs([tmp_path / "runs.csv"]).frame
    surface = fit_surface(frame, prior=laboratory_prior(removed=True))
    assert "sparsity" in surface.held and max(abs(surface.learning_rate[3]), abs(surface.batch[3])) < 0.5
    assert not any("sparsity" in name for name, _ in _parts(frame))


def test_runs_that_ended_in_their_warm_up_are_left_out(tmp_path: Path) -> None:
    table = pd.read_csv(synthetic(tmp_path / "all.csv"))
    warm_up = 2000.0 * table["batch_size"] * table["seq_len"]
    table.assign(warmup_tokens=warm_up).to_csv(tmp_path / "runs.csv", index=False)
    found = read_runs([tmp_path / "runs.csv"])
    late = table["tokens"] / (table["batch_size"] * table["seq_len"]) >= 2500
    assert 0 < late.sum() < len(table) and len(found.frame) == late.sum()
    (note,) = (note for note in found.warnings if "left out" in note)
    assert f"{(~late).sum()} of {len(table)} runs are left out" in note and "runs.csv:" in note
