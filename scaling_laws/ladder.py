"""Chooses the small runs to launch: the groups of runs that most reduce the target's expected excess loss per FLOP.

A group is a size and a duration with a pattern of runs around its expected optimum: a 3 x 3 grid of learning rate and batch
size, or a cross of five. With a WSD schedule (a constant learning rate, then a decay) up to three neighboring durations
share one pattern: trunks run to the longest duration, and the shorter runs branch off and decay, which costs little more
than the trunks (arXiv 2404.06395).

The surface of `scaling_laws.surface` is linearized at each grid, and each group has its own level. The runs of a group then
add Fisher information about the laws, which gives the covariance of (log lr*, log B*) at the target and the expected excess
loss tr(C^T C Cov). Groups are added greedily while the budget lasts (Bayesian c-optimal design). Sizes deviate from the laws
(`MISFIT`), so more runs of one small size do not tell where the optimum of a much larger one is. The prior's optimum is the
mean of what laboratories publish. The expectation holds if it is about right: grids that miss the true optimum tell less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scaling_laws.counted import counted
from scaling_laws.errors import InputError
from scaling_laws.laboratories import laboratories_law
from scaling_laws.surface import Surface, _features, _shape, shape_root
from scaling_laws.surface_fit import MISFIT

STEP = 0.8  # between neighbours of the grid, in log
Pattern = tuple[tuple[int, int], ...]  # runs of a group, in steps of `STEP` of (log lr, log B) around its optimum
PATTERNS: dict[str, Pattern] = {
    "grid": tuple((u, v) for u in (-1, 0, 1) for v in (-1, 0, 1)),
    "cross": ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)),
}
SHARING = 3  # neighbouring durations that can share a pattern, because their optima differ by less than its step
SIZES, DURATIONS = 3, 2  # the fewest that determine a law in N and a law in D
# Standard deviations of the prior: first log lr* or log B* at the reference, the exponents of N and D and the effect of
# sparsity, then the shape.
_PRIOR_LAW = (0.7, 0.15, 0.15, 0.2)
_PRIOR_SHAPE = (0.5, 0.05, 0.5, 0.005, 0.005, 0.005, 0.005)
_TYPICAL_SHAPE = (-2.4, -0.04, -2.5, 0.0, 0.0, 0.0, 0.0)  # as fitted to the public sweeps


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run to launch. ``group`` numbers its (size, duration). ``trunk`` is the index of the run that it branches from
    where its decay begins, if any; ``flops`` then leaves out the trunk."""

    group: int
    trunk: int | None
    n_total: float
    n_active: float
    tokens: float
    learning_rate: float
    batch_tokens: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Design:
    """Runs to launch. ``excess`` is the expected excess loss at the target after 0, 1, 2, ... groups, ``deviation`` the
    standard deviation of log lr* and of log B* there. ``noise`` is that of log loss between seeds, as assumed."""

    runs: list[Run]
    excess: list[float]
    deviation: tuple[float, float]
    noise: float

    @property
    def flops(self) -> float:
        return sum(run.flops for run in self.runs)


@dataclass(frozen=True)
class _Candidate:
    """A size with a pattern of runs for ``durations`` (tokens). Trunks run to the longest."""

    size: tuple[float, float]
    durations: tuple[float, ...]
    pattern: Pattern
    cost: float

    @property
    def ratios(self) -> set[float]:
        return {round(tokens / self.size[1], 3) for tokens in self.durations}

    @property
    def middle(self) -> float:
        """The duration whose optimum the pattern is centred on."""
        return float(np.exp(np.mean(np.log(self.durations))))


def _information(prior: Surface, candidate: _Candidate) -> np.ndarray:
    """Fisher information in its runs about (law of lr, law of B, shape), with each duration's level profiled out."""
    size = candidate.size
    centre = [float(value[0]) for value in prior.optimum(size[0], size[1], candidate.middle)]
    total = np.zeros((0,))
    for tokens in candidate.durations:
        here = [float(value[0]) for value in prior.optimum(size[0], size[1], tokens)]
        offset = np.log(np.array(centre) / np.array(here))
        one = _information_of_one(prior, (*size, tokens), candidate.pattern, offset)
        total = one if not total.size else total + one
    return total


def _information_of_one(
    prior: Surface, group: tuple[float, float, float], pattern: Pattern, offset: np.ndarray
) -> np.ndarray:
    x = _features(*group)[0]
    q = np.array(prior.shape)
    u, v = STEP * np.array(pattern, float).T + offset[:, None]
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
    return rows.T @ rows / prior.noise**2


def _joint(before: np.ndarray, told: "Information", chosen: Sequence[_Candidate]) -> np.ndarray:
    """The information of the prior and of ``chosen`` about the laws and the shape. Each size has its own deviation from the
    laws, which all of its runs share."""
    by_size: dict[tuple[float, float], np.ndarray] = {}
    for candidate in chosen:
        by_size[candidate.size] = by_size.get(candidate.size, np.zeros_like(before)) + told[candidate]
    total = before.copy()
    for one in by_size.values():
        shared = one[[0, 4]]  # with log lr* and log B*
        own = shared[:, [0, 4]] + np.diag(1 / np.square(MISFIT))
        total += one - shared.T @ np.linalg.solve(own, shared)
    return total


def _expected(information: np.ndarray, prior: Surface, target: np.ndarray) -> tuple[float, np.ndarray]:
    """(expected excess loss, covariance of log lr* and log B*) at a target given by its features."""
    pick = np.zeros((2, information.shape[0]))
    pick[0, :4], pick[1, 4:8] = target, target
    covariance = pick @ np.linalg.solve(information, pick.T)
    root = shape_root(prior.shape)
    return float(np.trace(root.T @ root @ covariance)), covariance


Information = dict[_Candidate, np.ndarray]  # what each candidate's runs tell, if its size follows the laws


@dataclass(frozen=True)
class _Selection:
    """The chosen candidates, the FLOPs that they leave, and the information of the prior, ``before`` them and with them."""

    chosen: tuple[_Candidate, ...]
    left: float
    before: np.ndarray
    information: np.ndarray

    @property
    def sizes(self) -> set[tuple[float, float]]:
        return {candidate.size for candidate in self.chosen}

    @property
    def durations(self) -> set[float]:
        return set().union(*(candidate.ratios for candidate in self.chosen))

    @property
    def complete(self) -> bool:
        """Whether laws in N and in D can be fitted."""
        return len(self.sizes) >= SIZES and len(self.durations) >= DURATIONS

    def needs(self, candidate: _Candidate) -> bool:
        """Whether the candidate may be added next. An incomplete selection takes only those that bring it nearer."""
        if len(self.sizes) < SIZES:
            return candidate.size not in self.sizes
        return len(self.durations) >= DURATIONS or not candidate.ratios <= self.durations

    def overlapping(self, candidate: _Candidate) -> list[_Candidate]:
        """The chosen candidates of the same size that have a duration in common with this one."""
        return [other for other in self.chosen if other.size == candidate.size and other.ratios & candidate.ratios]


def _completion(candidates: Sequence[_Candidate], chosen: Sequence[_Candidate]) -> float:
    """FLOPs that the missing ones of three sizes and two durations cost at least after ``chosen``."""
    used = {candidate.size for candidate in chosen}
    durations = set().union(*(candidate.ratios for candidate in chosen))
    cheapest: dict[tuple[float, float], float] = {}
    for candidate in candidates:
        if candidate.size not in used:
            cheapest[candidate.size] = min(candidate.cost, cheapest.get(candidate.size, np.inf))
    total = sum(sorted(cheapest.values())[: max(0, SIZES - len(used))])
    if len(durations) < DURATIONS:
        total += min((c.cost for c in candidates if not c.ratios <= durations and c.size in used), default=0.0)
    return total


def _candidates(
    sizes: Sequence[tuple[float, float]], ratios: Sequence[float], decay_share: float | None, pattern: Pattern
) -> list[_Candidate]:
    """Every size with every duration, and with WSD also with up to `SHARING` neighboring durations."""
    ordered = sorted(ratios)
    found = []
    for size in sizes:
        for first in range(len(ordered)):
            for length in range(1, 1 + (1 if decay_share is None else min(SHARING, len(ordered) - first))):
                durations = tuple(ratio * size[1] for ratio in ordered[first : first + length])
                tokens = durations[-1] + sum((decay_share or 0.0) * shorter for shorter in durations[:-1])
                found.append(_Candidate(size, durations, pattern, len(pattern) * 6 * size[1] * tokens))
    return found


def _extended(selection: _Selection, told: Information, prior: Surface, target: np.ndarray) -> _Selection | None:
    """Adds the candidate of ``told`` that lowers the expected excess most per FLOP. Returns None if none is worth it."""
    excess, _ = _expected(selection.information, prior, target)
    # A group must remove at least a thousandth of the excess loss that remains.
    least = 1e-3 * excess if selection.complete else 0.0
    scored: list[tuple[float, _Selection]] = []
    candidates = list(told)
    for candidate in candidates:
        replaced = selection.overlapping(candidate)
        # Each duration of a size is run once, but a candidate may be replaced by one with more durations.
        if len(replaced) > 1 or any(not other.ratios < candidate.ratios for other in replaced):
            continue
        if not selection.needs(candidate):
            continue
        cost = candidate.cost - sum(other.cost for other in replaced)
        chosen = (*(other for other in selection.chosen if other not in replaced), candidate)
        # The first groups must leave enough of the budget to complete the selection.
        if cost + _completion(candidates, chosen) > selection.left:
            continue
        information = _joint(selection.before, told, chosen)
        gain = excess - _expected(information, prior, target)[0]
        if gain > least:
            scored.append((gain / cost, _Selection(chosen, selection.left - cost, selection.before, information)))
    return max(scored, key=lambda one: one[0])[1] if scored else None


def design_ladder(
    target: tuple[float, float, float],
    sizes: Sequence[tuple[float, float]],
    tokens_per_parameter: Sequence[float],
    flops_budget: float,
    prior: Surface | None = None,
    decay_share: float | None = None,
    pattern: Pattern = PATTERNS["grid"],
) -> Design:
    """Chooses runs that a recommendation for ``target`` = (n_total, n_active, tokens) is best made from.

    The sum of their 6 N_active D stays within ``flops_budget``. ``sizes``: (n_total, n_active) of the models that can be
    built; ``tokens_per_parameter``: durations, in tokens per activated parameter; ``decay_share``: the decay's share of a
    run's tokens with WSD, where runs can branch off longer ones, else None; ``pattern``: the runs of each group. Raises
    InputError when the budget does not pay for three sizes at two durations.
    """
    known = prior if prior is not None else laboratories_law()
    if not any(known.shape):
        known = replace(known, shape=list(_TYPICAL_SHAPE))
    candidates = _candidates(sizes, tokens_per_parameter, decay_share, pattern)
    at_target = _features(*target)[0]
    before = np.diag(1 / np.array([*_PRIOR_LAW, *_PRIOR_LAW, *_PRIOR_SHAPE]) ** 2)
    told = {candidate: _information(known, candidate) for candidate in candidates}
    selection = _Selection((), flops_budget, before, before)
    history = [_expected(before, known, at_target)[0]]
    while (extended := _extended(selection, told, known, at_target)) is not None:
        selection = extended
        history.append(_expected(selection.information, known, at_target)[0])
    if not selection.complete:
        cheapest = min(candidates, key=lambda candidate: candidate.cost)
        least = cheapest.cost + _completion(candidates, [cheapest])
        raise InputError(
            f"--flops-budget {flops_budget:.3g} pays for {counted(len(selection.sizes), 'size')} at "
            f"{counted(len(selection.durations), 'duration')}; "
            f"at least {SIZES} and {DURATIONS} are needed, about {least:.2g} FLOPs for the three smallest: "
            "raise it, or start with a smaller recipe"
        )
    runs: list[Run] = []
    group = 0
    for candidate in sorted(selection.chosen, key=lambda c: c.cost):
        runs += _runs_of(candidate, known, group, len(runs), decay_share or 0.0)
        group += len(candidate.durations)
    _, covariance = _expected(selection.information, known, at_target)
    deviation = np.sqrt(np.diag(covariance))
    spread = (float(deviation[0]), float(deviation[1]))
    return Design(runs=runs, excess=history, deviation=spread, noise=known.noise)


def _runs_of(candidate: _Candidate, law: Surface, group: int, place: int, decay_share: float) -> list[Run]:
    """The runs of a candidate: first the trunks, at the longest duration, then the branches of each shorter one."""
    n_total, n_active = candidate.size
    rate, batch = (float(value[0]) for value in law.optimum(n_total, n_active, candidate.middle))
    found = []
    for turn, tokens in enumerate(reversed(candidate.durations)):
        trained = tokens if turn == 0 else decay_share * tokens
        for number, (u, v) in enumerate(candidate.pattern):
            found.append(
                Run(
                    group=group + turn,
                    trunk=None if turn == 0 else place + number,
                    n_total=n_total,
                    n_active=n_active,
                    tokens=tokens,
                    learning_rate=rate * float(np.exp(STEP * u)),
                    batch_tokens=batch * float(np.exp(STEP * v)),
                    flops=6 * n_active * trained,
                )
            )
    return found
