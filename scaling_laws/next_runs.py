"""Chooses the next runs by what they teach about the target, and says when another run costs more than it is worth.

The fit of the runs so far is a Gaussian (`surface_fit.Posterior`). A run at (N, D, lr, B) would add one observation of its
log loss, whose slopes by the parameters are known before it is run. So it is also known how uncertain lr* and B* at the
target would still be afterwards, and with it the expected excess loss tr(C^T C Cov) of the recommendation there.

What a lower excess is worth: instead, the target could be trained on more tokens until its loss is as low. With e = -d log L
/ d log D there, an excess x costs x / e of the target's FLOPs, or of what is paid for them. The next runs are those whose
worth exceeds their price by most, per run. If all cost more than they are worth, there are none.

Groups deviate from the loss law, and sizes from the laws of lr* and B* (`MISFIT`), so many runs of one small size do not
tell where the optimum of a much larger one is. A single run of a new group says little, because the group's own level is not
known. So several are weighed together too: a line of three learning rates or batches, a cross of five, and a grid of nine.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scaling_laws.ladder import STEP, Run
from scaling_laws.surface import WINDOW, _features, _shape, shape_root
from scaling_laws.surface_fit import MISFIT, ROUGH, Posterior

Size = tuple[float, float]  # n_total, n_active
_LINE = (-1, 0, 1)
FARTHEST = 2  # steps from the optimum
LEAST_BATCH = 0.9  # of a sequence: it is trained with one
# Patterns of runs, in steps of `STEP` of (log lr, log B) around the expected optimum.
PATTERNS: tuple[tuple[tuple[int, int], ...], ...] = (
    *(((u, v),) for u in range(-FARTHEST, FARTHEST + 1) for v in range(-FARTHEST, FARTHEST + 1)),
    tuple((u, 0) for u in _LINE),
    tuple((0, v) for v in _LINE),
    ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)),
    tuple((u, v) for u in _LINE for v in _LINE),
)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The price of one FLOP of a small run and of the target, in any one currency."""

    run: float = 1.0
    target: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The most useful runs, in the order of what they teach. ``excess`` and ``excess_after``: expected excess loss of the
    recommendation at the target now, and with these runs. ``deviation``: standard deviations of log lr* and log B* there.
    ``cost`` of the runs and their ``worth`` are in the prices' currency, as are ``target_cost`` and ``excess_worth``, the
    most that any runs could still be worth."""

    runs: list[Run]
    excess: float
    excess_after: float
    deviation: tuple[float, float]
    cost: float
    worth: float
    target_cost: float
    excess_worth: float

    @property
    def stop(self) -> bool:
        """Whether no further run is worth its price."""
        return not self.runs or self.worth <= self.cost


@dataclass(frozen=True)
class _Known:
    """What is known: the posterior's covariance with the deviations of further groups and sizes, and their places in it."""

    covariance: np.ndarray
    groups: dict[tuple[float, float, float], int]
    sizes: dict[Size, int]

    def _wider(self, deviations: Sequence[float]) -> np.ndarray:
        size, more = len(self.covariance), len(deviations)
        wider = np.zeros((size + more, size + more))
        wider[:size, :size], wider[size:, size:] = self.covariance, np.diag(np.square(deviations))
        return wider

    def with_group(self, group: tuple[float, float, float], spread: float) -> "_Known":
        """With a place for the group and one for its size."""
        known = self
        if group not in known.groups:
            groups = known.groups | {group: len(known.covariance)}
            known = replace(known, covariance=known._wider([spread]), groups=groups)
        if group[:2] not in known.sizes:
            sizes = known.sizes | {group[:2]: len(known.covariance)}
            known = replace(known, covariance=known._wider(MISFIT), sizes=sizes)
        return known


@dataclass(frozen=True)
class _Package:
    """Runs of one group that are weighed together, by their steps from its optimum."""

    size: Size
    tokens: float
    steps: tuple[tuple[float, float], ...]

    @property
    def group(self) -> tuple[float, float, float]:
        return (*self.size, self.tokens)

    @property
    def flops(self) -> float:
        return len(self.steps) * 6 * self.size[1] * self.tokens

    def repeats(self, other: "_Package") -> bool:
        """Whether both have a run in common."""
        return self.group == other.group and not set(self.steps).isdisjoint(other.steps)


class _Design:
    """What packages of runs would teach about ``target`` (n_total, n_active, tokens)."""

    def __init__(self, posterior: Posterior, target: tuple[float, float, float]) -> None:
        self.posterior = posterior
        self.shape = np.array(posterior.surface.shape)
        x = _features(*target)[0]
        # By the parameters: log lr* and log B* at the target, and the root of the excess loss that they cause.
        self.pick = np.zeros((2, len(posterior.parameters)))
        self.pick[0, :4], self.pick[1, 4:8] = x, x
        self.root = shape_root(self.shape) @ self.pick

    def excess(self, known: _Known) -> float:
        size = len(self.posterior.parameters)
        return float(np.trace(self.root @ known.covariance[:size, :size] @ self.root.T))

    def deviation(self, known: _Known) -> tuple[float, float]:
        size = len(self.posterior.parameters)
        rate, batch = np.sqrt(np.diag(self.pick @ known.covariance[:size, :size] @ self.pick.T))
        return float(rate), float(batch)

    def height(self, steps: Sequence[tuple[float, float]]) -> np.ndarray:
        u, v = STEP * np.array(steps, float).T
        return _shape(self.shape, u, v)

    def learn(self, known: _Known, package: _Package) -> _Known:
        """What is known once the package's runs are finished."""
        known = known.with_group(package.group, self.posterior.spread)
        u, v = STEP * np.array(package.steps, float).T
        rows = np.zeros((len(u), len(known.covariance)))
        rows[:, : len(self.posterior.parameters)] = self.posterior.slopes(*package.group, u, v)
        rows[:, known.groups[package.group]] = 1
        place = known.sizes[package.size]
        rows[:, place : place + 2] = rows[:, [0, 4]]  # the slopes by log lr* and log B*
        noise = np.diag(self.posterior.surface.noise**2 + (ROUGH * np.maximum(0, self.height(package.steps))) ** 2)
        told = rows @ known.covariance
        left = known.covariance - told.T @ np.linalg.solve(noise + told @ rows.T, told)
        return replace(known, covariance=left)


def _packages(sizes: Sequence[Size], ratios: Sequence[float], design: _Design, sequence: float) -> list[_Package]:
    """Every pattern of runs at every size and duration, if the surface can be trusted there and no batch is smaller than a
    sequence."""
    patterns = [steps for steps in PATTERNS if bool(np.all(design.height(steps) <= WINDOW))]
    found = []
    for size, ratio in itertools.product(sizes, ratios):
        tokens = ratio * size[1]
        batch = float(design.posterior.surface.optimum(*size, tokens)[1][0])
        for steps in patterns:
            if batch * np.exp(STEP * min(v for _, v in steps)) >= LEAST_BATCH * sequence:
                found.append(_Package(size, tokens, steps))
    return found


def _runs(package: _Package, posterior: Posterior, group: int) -> list[Run]:
    n_total, n_active = package.size
    rate, batch = (float(value[0]) for value in posterior.surface.optimum(n_total, n_active, package.tokens))
    return [
        Run(
            group=group,
            trunk=None,
            n_total=n_total,
            n_active=n_active,
            tokens=package.tokens,
            learning_rate=rate * float(np.exp(STEP * u)),
            batch_tokens=batch * float(np.exp(STEP * v)),
            flops=6 * n_active * package.tokens,
        )
        for u, v in package.steps
    ]


def excess_after(posterior: Posterior, target: tuple[float, float, float], runs: Sequence[Run]) -> list[float]:
    """The expected excess loss at the target with each of ``runs`` alone; as before it, where the surface is not trusted."""
    design = _Design(posterior, target)
    known = _Known(posterior.covariance, posterior.groups, posterior.sizes)
    found = []
    for run in runs:
        rate, batch = (float(x[0]) for x in posterior.surface.optimum(run.n_total, run.n_active, run.tokens))
        steps = ((np.log(run.learning_rate / rate) / STEP, np.log(run.batch_tokens / batch) / STEP),)
        package = _Package((run.n_total, run.n_active), run.tokens, steps)
        trusted = design.height(steps)[0] <= WINDOW and np.abs(steps).max() <= FARTHEST
        found.append(design.excess(design.learn(known, package) if trusted else known))
    return found


def next_runs(
    posterior: Posterior,
    target: tuple[float, float, float],
    sizes: Sequence[Size],
    tokens_per_parameter: Sequence[float],
    *,
    count: int = 9,
    flops: float = np.inf,
    prices: Prices = Prices(),
    sequence: float = 0.0,
) -> Advice:
    """The next runs, at most ``count`` with at most ``flops``, for a recommendation at ``target`` (n_total, n_active,
    tokens). They have one of ``sizes`` (n_total, n_active) and of ``tokens_per_parameter`` (activated), and batches of at
    least a ``sequence`` (in tokens)."""
    design = _Design(posterior, target)
    known = _Known(posterior.covariance, posterior.groups, posterior.sizes)
    before, deviation = design.excess(known), design.deviation(known)
    excess = before
    target_cost = 6 * target[1] * target[2] * prices.target
    worth_of_excess = target_cost / posterior.token_exponent(*target)
    chosen: list[Run] = []
    packages: list[_Package] = []
    groups: dict[tuple[float, float, float], int] = {}
    spent = 0.0
    possible = _packages(sizes, tokens_per_parameter, design, sequence)
    while len(chosen) < count:
        best: tuple[float, _Package, _Known, float] | None = None
        for package in possible:
            if len(package.steps) > count - len(chosen) or spent + package.flops > flops:
                continue
            if any(taken.repeats(package) for taken in packages):
                continue
            then = design.learn(known, package)
            left = design.excess(then)
            net = ((excess - left) * worth_of_excess - package.flops * prices.run) / len(package.steps)
            if best is None or net > best[0]:
                best = net, package, then, left
        # The first package is given even if it is not worth its price, so that the user sees by how much.
        if best is None or (packages and best[0] <= 0):
            break
        _, package, known, excess = best
        packages.append(package)
        chosen += _runs(package, posterior, groups.setdefault(package.group, len(groups)))
        spent += package.flops
    return Advice(
        runs=chosen,
        excess=before,
        excess_after=excess,
        deviation=deviation,
        cost=spent * prices.run,
        worth=(before - excess) * worth_of_excess,
        target_cost=target_cost,
        excess_worth=before * worth_of_excess,
    )
