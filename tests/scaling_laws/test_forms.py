"""Forms of the loss: each is found again from runs that follow it, predicts beyond them, and is chosen when it is true."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_laws.errors import InputError
from scaling_laws.forms import FORMS, Points, points
from scaling_laws.loss_law import LossLaw, compute_optimal, fit_loss
from scaling_laws.validation import _parts, choose_form, hold_outs
from tests.scaling_laws.data import synthetic

BASE = {"e": 1.6, "big_a": 0.4, "big_b": 0.35, "a": 0.33, "b": 0.31}
TRUTH: dict[str, dict[str, float]] = {
    "chinchilla": BASE,
    "effective": BASE | {"w": 0.45},
    "clark": BASE | {"c": 0.12, "m": -0.015},
    "abnar": BASE | {"big_c": 0.02, "l": 0.3, "big_f": 0.03, "m": -0.4, "f": 0.25},
    "krajewski": BASE | {"big_f": 0.12, "f": 0.6},
    "data_constrained": BASE | {"r_d": 12.0, "r_n": 5.0},
    "farseer": {"p": 0.3, "q": 0.45, "g": 0.3, "r": 0.3, "s": -1.2, "t": -0.3, "v": -0.8, "k": 0.1, "h": -0.1},
}


def plan(form: str, largest: float = 1e9) -> Points:
    """Sizes and durations up to ``largest`` parameters, varied in whatever the form needs."""
    rows = []
    for n in largest * np.array([0.02, 0.05, 0.12, 0.3, 1.0]):
        for ratio in (10, 25, 60, 150):
            if form in ("effective", "clark", "abnar"):
                rows += [(n * share, n, ratio * n, 1, ratio * n) for share in (1, 2, 5, 12, 30)]
            elif form == "krajewski":
                rows += [(n, n, ratio * n, g, ratio * n) for g in (1, 2, 8, 32)]
            elif form == "data_constrained":
                rows += [(n, n, ratio * n, 1, ratio * n / times) for times in (1, 4, 16, 60)]
            else:
                rows.append((n, n, ratio * n, 1, ratio * n))
    n_total, n_active, tokens, granularity, unique = (np.array(column, float) for column in zip(*rows, strict=True))
    return points(n_total, n_active, tokens, granularity, unique)


def truth(form: str, where: Points) -> np.ndarray:
    law = FORMS[form]
    return law.predict(np.array([TRUTH[form][name] for name in law.names]), where)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_found_again_and_predicts_ten_times_beyond(form: str) -> None:
    where, beyond = plan(form), plan(form, 1e10)
    noise = np.exp(np.random.default_rng(3).normal(0, 5e-4, len(where.tokens)))
    law = fit_loss(where, truth(form, where) * noise, form)
    assert law.objective < 1.5e-7 * 2 * len(where.tokens)  # what noise of 5e-4 leaves: half its variance, summed
    assert np.abs(law.at(beyond) / truth(form, beyond) - 1).max() < 0.015
    assert law.text


def test_one_call_for_many_parameters_is_the_same_as_one_by_one() -> None:
    """The Jacobian relies on it."""
    for form, law in FORMS.items():
        where = plan(form)
        base = np.array([TRUTH[form][name] for name in law.names])
        many = base[:, None] * np.array([1.0, 1.01, 0.98])
        together = law.predict(many[:, :, None], where)
        for column in range(3):
            np.testing.assert_allclose(together[column], law.predict(many[:, column], where), rtol=1e-13)


def _frame(form: str, seed: int = 0) -> pd.DataFrame:
    where = plan(form)
    loss = truth(form, where) * np.exp(np.random.default_rng(seed).normal(0, 5e-4, len(where.tokens)))
    frame = pd.DataFrame({name: getattr(where, name) for name in Points.__dataclass_fields__} | {"loss": loss})
    return frame.assign(group=np.arange(len(frame)), diverged=False)


def test_what_is_held_out_is_not_fitted() -> None:
    frame = _frame("chinchilla")
    parts = hold_outs(frame, tuned=False)
    assert len(parts) > 2
    for part in parts:
        assert len(part.outside) and not set(part.inside["group"]) & set(part.outside["group"]), part.name
        assert len(part.inside) + len(part.outside) == len(frame)


@pytest.mark.parametrize("form", ["chinchilla", "effective", "clark", "krajewski", "data_constrained"])
def test_the_true_form_is_chosen_by_what_was_held_out(form: str) -> None:
    frame = _frame(form)
    chosen, notes = choose_form(frame, hold_outs(frame, tuned=False))
    assert chosen == form, notes


def test_few_groups_get_the_form_that_they_determine() -> None:
    """Five groups of two sparsities leave nothing to hold out: six parameters are too many for them."""
    frame = _frame("effective").iloc[[0, 1, 7, 8, 14]]
    chosen, _ = choose_form(frame, [])
    assert chosen == "chinchilla"
    assert choose_form(_frame("effective").iloc[[0, 1, 7, 8, 14, 15]], [])[0] == "effective"


def test_what_a_table_cannot_tell_is_refused() -> None:
    where = plan("chinchilla")
    for form, why in (
        ("effective", "one sparsity only"),
        ("krajewski", "fewer than 3 granularities"),
        ("data_constrained", "data is not repeated"),
    ):
        with pytest.raises(InputError, match=why):
            fit_loss(where, truth("chinchilla", where), form)
    few = points(np.array([1e8, 2e8]), np.array([1e8, 2e8]), np.array([1e9, 2e9]))
    with pytest.raises(InputError, match="2 different"):
        fit_loss(few, np.array([3.0, 2.9]))


def test_compute_optimal_is_the_closed_form() -> None:
    """N* = G (C/6)^(b/(a+b)), G = (aA/bB)^(1/(a+b)), equation 4 of arXiv 2203.15556."""
    where = plan("chinchilla")
    law = fit_loss(where, truth("chinchilla", where))
    n, tokens, _ = compute_optimal(law, 1e22)
    a, b = BASE["a"], BASE["b"]
    expected = (a * BASE["big_a"] / (b * BASE["big_b"]) * (1e22 / 6 / 1e19) ** b) ** (1 / (a + b)) * 1e9
    assert n == pytest.approx(expected, rel=0.02) and 6 * n * tokens == pytest.approx(1e22)
    # Also far below a million parameters.
    n, tokens, _ = compute_optimal(law, 1e10)
    assert n == pytest.approx(expected * (1e10 / 1e22) ** (b / (a + b)), rel=0.02) and n < 1e5
    n, tokens, _ = compute_optimal(law, 1e22)
    # The law is of activated parameters: a quarter of them changes the total, and no more.
    n_total, tokens_of_quarter, _ = compute_optimal(law, 1e22, ratio=0.25)
    assert n_total == pytest.approx(4 * n) and tokens_of_quarter == pytest.approx(tokens)


@pytest.mark.parametrize(("changes", "better"), [({"big_b": 0.0}, "larger"), ({"big_a": 0.0}, "smaller")])
def test_a_law_without_a_best_size_says_so(changes: dict[str, float], better: str) -> None:
    """Where tokens, or parameters, do not matter. The end of the search would be taken for an optimum."""
    law = LossLaw(form="chinchilla", values=BASE | changes, objective=0.0, starts=1, spread=0.0, condition=1.0)
    with pytest.raises(InputError, match=f"no compute-optimal size for 1e.22 FLOPs: by it, a {better} model"):
        compute_optimal(law, 1e22)
    law = LossLaw(form="chinchilla", values=BASE, objective=0.0, starts=1, spread=0.0, condition=1.0)
    n, tokens, loss = compute_optimal(law, 1e32)  # a model of 1e15 parameters and more is one
    assert loss < law.predict(n / 2, n / 2, 2 * tokens)[0] and loss < law.predict(2 * n, 2 * n, tokens / 2)[0]


def test_compute_optimal_is_that_of_the_granularity() -> None:
    """F / G^f is a part of A, so the closed form holds with it."""
    where = plan("krajewski")
    law = fit_loss(where, truth("krajewski", where), form="krajewski")
    a, b, true = BASE["a"], BASE["b"], TRUTH["krajewski"]
    for granularity in (1, 32):
        n, _, loss = compute_optimal(law, 1e22, granularity=granularity)
        big_a = true["big_a"] + true["big_f"] * granularity ** -true["f"]
        expected = (a * big_a / (b * true["big_b"]) * (1e22 / 6 / 1e19) ** b) ** (1 / (a + b)) * 1e9
        assert n == pytest.approx(expected, rel=0.02)
        assert loss == pytest.approx(law.predict(n, n, 1e22 / 6 / n, granularity=granularity)[0])


def test_losses_too_small_for_a_law_are_refused() -> None:
    where = plan("chinchilla")
    with pytest.raises(InputError, match=r"the least loss is .*e-05, and a loss law needs losses above 0.001"):
        fit_loss(where, 1e-5 * truth("chinchilla", where))


def test_the_same_runs_are_held_out_once(tmp_path: Path) -> None:
    """The largest size may be what has most compute, and a sparsity of its own: that is one test, not three."""
    frame = pd.read_csv(synthetic(tmp_path / "runs.csv"))
    frame["n_active"] = frame["n_total"].where(frame["n_total"] < 4e8, 1e8)
    frame["diverged"], frame["batch_tokens"] = False, frame["batch_size"] * frame["seq_len"]
    frame["group"] = frame.groupby(["n_total", "tokens"]).ngroup()
    names = [name for name, _ in _parts(frame)]
    assert "largest N (4e+08)" in names and "sparsity 0.25" in names
    assert [part.name for part in hold_outs(frame, False)] == [name for name in names if name != "sparsity 0.25"]
