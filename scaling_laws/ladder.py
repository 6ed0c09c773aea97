"""Which small runs to launch: groups of runs that most reduce the expected excess loss of the target, per FLOP.

A candidate group is a size and a duration with a 3 x 3 grid of learning rate and batch around its expected optimum. With
the surface of `scaling_laws.surface` linearised there, and a level of its own for each group, its runs add information
about the laws; the covariance of (log lr*, log B*) at the target follows, and from it the expected excess loss
tr(C^T C Cov). Groups are added greedily while the budget lasts (Bayesian c-optimal design; the prior is Step Law). What
is promised holds where the prior's optimum is about right; grids that miss the true optimum tell less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling_laws.errors import InputError
from scaling_laws.surface import NOISE, PRIOR, Surface, _features, _shape, step_law_as_published

STEP = 0.8  # between neighbours of the grid, in log
# Standard deviations of the prior: log lr* and log B* at the reference, exponents of N and D, effect of sparsity; the shape.
_PRIOR_LAW = (0.7, *PRIOR)
_PRIOR_SHAPE = (0.5, 0.05, 0.5, 0.005, 0.005, 0.005, 0.005)
_TYPICAL_SHAPE = (-2.4, -0.04, -2.5, 0.0, 0.0, 0.0, 0.0)  # of the public sweeps


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run to launch; ``group`` numbers the (size, duration) it belongs to."""

    group: int
    n_total: float
    n_active: float
    tokens: float
    learning_rate: float
    batch_tokens: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Design:
    """``excess``: expected excess loss at the target after 0, 1, 2, ... groups; ``deviation``: of log lr*, log B* there."""

    runs: list[Run]
    excess: list[float]
    deviation: tuple[float, float]

    @property
    def flops(self) -> float:
        return sum(run.flops for run in self.runs)


def _information(prior: Surface, size: tuple[float, float], tokens: float) -> np.ndarray:
    """Fisher information of one group's grid about (law of lr, law of B, shape), its level profiled out."""
    x = _features(size[0], size[1], tokens)[0]
    q = np.array(prior.shape)
    u, v = (grid.ravel() for grid in np.meshgrid(*[np.array([-STEP, 0.0, STEP])] * 2))
    small = 1e-5
    by_u = (_shape(q, u + small, v) - _shape(q, u - small, v)) / (2 * small)
    by_v = (_shape(q, u, v + small) - _shape(q, u, v - small)) / (2 * small)
    by_q = []
    for place in range(len(q)):
        step = np.zeros_like(q)
        step[place] = small
        by_q.append((_shape(q + step, u, v) - _shape(q - step, u, v)) / (2 * small))
    rows = np.concatenate([-np.outer(by_u, x), -np.outer(by_v, x), np.stack(by_q, axis=1)], axis=1)
    rows -= rows.mean(0)
    return rows.T @ rows / NOISE**2


def _expected(information: np.ndarray, prior: Surface, target: np.ndarray) -> tuple[float, np.ndarray]:
    """(expected excess loss, covariance of log lr* and log B*) at the target's features."""
    pick = np.zeros((2, information.shape[0]))
    pick[0, :4], pick[1, 4:8] = target, target
    covariance = pick @ np.linalg.solve(information, pick.T)
    q = prior.shape
    root = np.array([[np.exp(q[0]), 0.0], [q[1], np.exp(q[2])]])
    return float(np.trace(root.T @ root @ covariance)), covariance


def _completion(candidates: Sequence[tuple[tuple[float, float], float, float]], chosen: Sequence[int]) -> float:
    """The least that three sizes and two durations still cost after ``chosen``."""
    used = {candidates[index][0] for index in chosen}
    durations = {round(candidates[index][1] / candidates[index][0][1], 3) for index in chosen}
    cheapest: dict[tuple[float, float], float] = {}
    for size, _, cost in candidates:
        if size not in used:
            cheapest[size] = min(cost, cheapest.get(size, np.inf))
    total = sum(sorted(cheapest.values())[: max(0, 3 - len(used))])
    if len(durations) < 2:
        total += min((c for size, d, c in candidates if round(d / size[1], 3) not in durations), default=0.0)
    return total


def design_ladder(
    target: tuple[float, float, float],
    sizes: Sequence[tuple[float, float]],
    tokens_per_parameter: Sequence[float],
    flops_budget: float,
    prior: Surface | None = None,
) -> Design:
    """Runs for a recommendation at ``target`` = (n_total, n_active, tokens) within ``flops_budget`` (6 N_active D, summed).

    ``sizes``: (n_total, n_active) that can be built; ``tokens_per_parameter``: durations, of activated parameters. Raises
    InputError when the budget does not pay for three sizes at two durations.
    """
    known = prior if prior is not None else step_law_as_published()
    if not any(known.shape):
        known = Surface(
            learning_rate=known.learning_rate, batch=known.batch, shape=list(_TYPICAL_SHAPE), held=known.held
        )
    candidates = [
        (size, ratio * size[1], 9 * 6 * size[1] * ratio * size[1]) for size in sizes for ratio in tokens_per_parameter
    ]
    at_target = _features(*target)[0]
    total = np.diag(1 / np.array([*_PRIOR_LAW, *_PRIOR_LAW, *_PRIOR_SHAPE]) ** 2)
    excess, covariance = _expected(total, known, at_target)
    history, left = [excess], flops_budget
    chosen: list[int] = []
    while True:
        scored = []
        used = {candidates[index][0] for index in chosen}
        durations = {round(candidates[index][1] / candidates[index][0][1], 3) for index in chosen}
        for index, (size, tokens, cost) in enumerate(candidates):
            if index in chosen or cost > left:
                continue
            # Laws in N and in D need three sizes and two durations before anything else.
            if len(used) < 3 and size in used:
                continue
            if len(used) >= 3 and len(durations) < 2 and round(tokens / size[1], 3) in durations:
                continue
            # And what is bought first must leave enough for them.
            if cost + _completion(candidates, [*chosen, index]) > left:
                continue
            after, _ = _expected(total + _information(known, size, tokens), known, at_target)
            scored.append(((history[-1] - after) / cost, index))
        # What a group gains must still be worth noticing: a thousandth of what is left to lose.
        if len(used) >= 3 and len(durations) >= 2:
            scored = [(gain, i) for gain, i in scored if gain * candidates[i][2] > 1e-3 * history[-1]]
        if not scored:
            break
        _, best = max(scored)
        size, tokens, cost = candidates[best]
        total = total + _information(known, size, tokens)
        excess, covariance = _expected(total, known, at_target)
        history.append(excess)
        chosen.append(best)
        left -= cost
    used = {candidates[index][0] for index in chosen}
    durations = {round(candidates[index][1] / candidates[index][0][1], 3) for index in chosen}
    if len(used) < 3 or len(durations) < 2:
        each = sorted(sizes, key=lambda size: size[1])[:3]
        least = sum(9 * 6 * size[1] ** 2 * ratio for size in each for ratio in sorted(tokens_per_parameter)[:2])
        raise InputError(
            f"--flops-budget {flops_budget:.3g} pays for {len(used)} sizes at {len(durations)} durations; at least 3 and 2 "
            f"are needed, about {least:.2g} FLOPs for the three smallest: raise it, or begin with a smaller recipe"
        )
    runs = []
    for group, index in enumerate(sorted(chosen, key=lambda i: candidates[i][2])):
        size, tokens, _ = candidates[index]
        rate, batch = (float(value[0]) for value in known.optimum(size[0], size[1], tokens))
        for u in (-STEP, 0.0, STEP):
            for v in (-STEP, 0.0, STEP):
                runs.append(
                    Run(
                        group=group,
                        n_total=size[0],
                        n_active=size[1],
                        tokens=tokens,
                        learning_rate=rate * float(np.exp(u)),
                        batch_tokens=batch * float(np.exp(v)),
                        flops=6 * size[1] * tokens,
                    )
                )
    deviation = np.sqrt(np.diag(covariance))
    return Design(runs=runs, excess=history, deviation=(float(deviation[0]), float(deviation[1])))
