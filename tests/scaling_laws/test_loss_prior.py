"""The expected exponents of the loss law: they decide where groups are few, and hardly count where they are many."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from scaling_laws.forms import FORMS, Points, points
from scaling_laws.laboratories import LOSS_BETWEEN, laboratory_prior
from scaling_laws.loss_law import LossLaw, fit_loss
from scaling_laws.surface_fit import OFFSET
from scaling_laws.validation import law_of

EXPONENTS = laboratory_prior().loss
NAMES = FORMS["chinchilla"].names


def truth(a: float, b: float, where: Points) -> np.ndarray:
    return FORMS["chinchilla"].predict(np.array([1.6, 0.4, 0.35, a, b]), where)


def groups(sizes: int, durations: int) -> Points:
    n, ratio = np.meshgrid(np.geomspace(2e7, 2e8, sizes), np.geomspace(10, 160, durations))
    return points(n.ravel(), n.ravel(), (n * ratio).ravel())


def _around(x: np.ndarray) -> np.ndarray:
    return np.vstack([x, x + 0.05 * np.eye(len(x))])


def test_the_expected_exponents_are_the_geometric_means_of_those_that_are_cited() -> None:
    cited = np.array([[0.348, 0.366], [0.353, 0.353], [0.115, 0.147]])
    np.testing.assert_allclose(EXPONENTS, cited.prod(0) ** (1 / 3), rtol=1e-12)
    np.testing.assert_allclose(EXPONENTS, (0.24, 0.27), atol=0.005)  # what docs/scaling-laws.md says


def test_few_groups_predict_better_with_expected_exponents() -> None:
    """Laws that vary as they are assumed to, in a ladder of 3 sizes and 2 durations, and a model of 5 times its largest."""
    sizes, ratios = np.meshgrid([5e7, 1e8, 2e8], [20, 40])
    where, beyond = points(sizes.ravel(), sizes.ravel(), (sizes * ratios).ravel()), points(1e9, 1e9, 2e10)
    rng = np.random.default_rng(0)
    missed: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(8):
        a, b = np.array(EXPONENTS) * np.exp(rng.normal(0, LOSS_BETWEEN))
        loss = truth(a, b, where) * np.exp(rng.normal(0, OFFSET, len(where.n)))
        for known, found in missed.items():
            law = fit_loss(where, loss, exponents=EXPONENTS if known else None)
            found.append(abs(float(law.at(beyond)[0] / truth(a, b, beyond)[0]) - 1))
    assert np.mean(missed[True]) < 0.85 * np.mean(missed[False]), missed


def test_many_groups_tell_the_exponents_themselves() -> None:
    where = groups(8, 6)
    loss = truth(0.45, 0.5, where) * np.exp(np.random.default_rng(1).normal(0, 5e-4, len(where.n)))
    free, known = (fit_loss(where, loss, exponents=exponents) for exponents in (None, EXPONENTS))
    for name in ("a", "b"):
        assert known.values[name] == pytest.approx(free.values[name], rel=0.02)
    assert known.objective == pytest.approx(free.objective, rel=0.05)


def test_the_objective_is_that_of_the_runs_alone() -> None:
    where = groups(3, 3)
    loss = truth(0.34, 0.28, where) * np.exp(np.random.default_rng(2).normal(0, 5e-3, len(where.n)))
    law = fit_loss(where, loss, exponents=(0.6, 0.6))
    left = np.abs(np.log(law.at(where) / loss))
    assert law.objective == pytest.approx(np.where(left <= 1e-3, left**2 / 2, 1e-3 * (left - 5e-4)).sum(), rel=1e-9)


def test_the_least_of_the_cost_is_found() -> None:
    """By a search without derivatives, in the costs written out again: Huber's for the runs, squares for the prior."""
    where = groups(4, 3)
    loss = truth(0.1, 0.1, where) * np.exp(np.random.default_rng(3).normal(0, 4e-3, len(where.n)))
    free, law = fit_loss(where, loss), fit_loss(where, loss, exponents=EXPONENTS)
    left = np.log(free.at(where) / loss)
    deviation = np.sqrt((np.sum(left**2) + 5 * OFFSET**2) / (len(left) - 5 + 5))
    assert free.deviation(where, loss) == pytest.approx(deviation)

    def cost(one: LossLaw) -> float:
        size = np.abs(np.log(one.at(where) / loss))
        runs = np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()
        off = [np.log(one.values[name] / value) for name, value in zip(("a", "b"), EXPONENTS, strict=True)]
        return float(runs + 1e-3 * deviation * np.sum(np.square(off) / np.square(LOSS_BETWEEN)) / 2)

    def lower(x: np.ndarray) -> float:
        values = dict(zip(NAMES, np.exp(x).tolist(), strict=True))
        return 1e6 * cost(dataclasses.replace(law, values=values))

    best = np.log([law.values[name] for name in NAMES])
    for _ in range(3):
        best = minimize(
            lower, best, method="Nelder-Mead", options={"maxiter": 1000, "initial_simplex": _around(best)}
        ).x
    assert lower(best) > 1e6 * cost(law) * (1 - 1e-3)
    assert cost(law) < cost(free)


def test_a_removed_prior_expects_nothing() -> None:
    where = groups(3, 3)
    loss = truth(0.34, 0.28, where) * np.exp(np.random.default_rng(5).normal(0, 3e-3, len(where.n)))
    frame = pd.DataFrame({"n_total": where.n_total, "n_active": where.n_active, "tokens": where.tokens, "loss": loss})
    removed = law_of(frame, "chinchilla", prior=laboratory_prior(removed=True))
    assert removed.values == fit_loss(where, loss).values
    used = law_of(frame, "chinchilla", prior=laboratory_prior())
    assert used.values == law_of(frame, "chinchilla").values == fit_loss(where, loss, exponents=EXPONENTS).values
    assert used.values["a"] != pytest.approx(removed.values["a"], rel=1e-3)


def test_draws_of_the_prior_vary_as_published_exponents_do() -> None:
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    prior = laboratory_prior()
    drawn = [prior.drawn(rng) for _ in range(400)]
    spread = np.log([one.loss for one in drawn]).std(0)
    np.testing.assert_allclose(spread, LOSS_BETWEEN, rtol=0.1)
    # The other draws do not depend on these.
    np.testing.assert_array_equal(drawn[0].learning_rate[0], same.multivariate_normal(*prior.learning_rate))
