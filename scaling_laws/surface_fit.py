"""Fits the surface of `scaling_laws.surface` to a table of runs, from a dozen runs to thousands.

Three parts are fitted together, each a Gaussian around something simpler: losses around the surface, levels of groups around
the loss law, and the laws of lr* and B* around a prior. The loss of run i of group g is

    log L_i = log (E + A / N^a + B / D^b) + offset_g + shape(u_i, v_i) + error_i,  N = N_active^(1-w) N_total^w

Offsets are Gaussian with a deviation that is estimated, so a group with many runs has a level of its own, and a group with
one run still says where the optimum is. An error's deviation near the optimum, the noise, is estimated and at least `NOISE`.
It grows with the height above the optimum (`ROUGH`), because the cubic describes runs far from it less well. Large errors
count less (`ROBUST`). No run is far below the optimum (`_Problem.too_low`). The laws of lr* and B* have the prior of
`scaling_laws.laboratories`; shape and loss have wide ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from scaling_laws.counted import counted
from scaling_laws.errors import InputError
from scaling_laws.laboratories import Prior, laboratory_prior
from scaling_laws.surface import FEATURES, NOISE, WINDOW, Surface, _features, _free, _shape

ROUGH = 0.2  # deviation of an error per height above the optimum: as in Step Law's sweeps below 2.2e8, dense and MoE
ROBUST = 2.0  # deviations, beyond which an error counts less
OFFSET, OFFSET_WEIGHT = 3e-3, 5.0  # expected deviation of a group's offset; as how many groups it counts
NOISE_WEIGHT = 5.0  # as how many runs the expected noise counts
_CLIPPED = 0.92  # the mean of min(z^2, ROBUST^2) for a standard Gaussian z
# Deviations of log lr* and log B* of a size from the laws: as of Step Law's eight sizes, dense and MoE.
MISFIT = (0.12, 0.08)
LEAST_RUNS = 8
ASSUMED = 0.5  # an exponent is assumed if the prior gives more than this share of what is known about it
# A loss that is 1% higher at a factor of e, give or take a factor of e; no correlation; hardly any cubic.
_SHAPE_MEAN = np.array([np.log(0.1), 0.0, np.log(0.1), 0.0, 0.0, 0.0, 0.0])
_SHAPE_DEVIATION = np.array([0.5, 0.05, 0.5, 0.005, 0.005, 0.005, 0.005])
# log E, log A, log B, a, b in units of 1e9 and 1e10, around the fits of arXiv 2203.15556 and 2404.10102; then w.
_LOSS_MEAN = np.array([np.log(1.75), np.log(0.36), np.log(0.45), 0.34, 0.34, 0.3])
_LOSS_DEVIATION = np.array([0.3, 0.5, 0.5, 0.06, 0.06, 0.2])
_LAW, _BOWL, _LOSS = 8, 15, 21  # where the laws, the shape and the loss's parameters end
_ROUNDS, _CLOSE = 10, 1e-2  # of reweighting; steps smaller than this, in deviations of the prior, end it


def _check(finished: pd.DataFrame) -> None:
    """Raises InputError if the runs cannot tell a learning rate and a batch size."""
    if len(finished) < LEAST_RUNS:
        raise InputError(
            f"{counted(len(finished), 'finished run')}; at least {LEAST_RUNS} are needed to find a learning rate and "
            "batch size: run several of both, best as a grid for each size and duration"
        )
    if finished["loss"].nunique() < 2:
        raise InputError(
            f"all {counted(len(finished), 'finished run')} have the same loss, {finished['loss'].iloc[0]:g}: is it the "
            "right column? Nothing can be fitted to losses that do not differ"
        )
    sizes = finished.groupby("group")["loss"].transform("size")
    grids = finished[sizes >= 3]
    for column, told in (("learning_rate", "learning rates"), ("batch_tokens", "batch sizes (batch_size x seq_len)")):
        varied = (grids.groupby("group")[column].nunique() > 1).any()
        if len(grids) < 0.5 * len(finished):  # scattered runs, which are compared across groups
            varied = finished[column].nunique() > 1
        if not varied:
            raise InputError(
                f"{told} do not vary within any group of runs (a group: equal n_total, n_active, tokens, "
                "and experts, granularity and unique_tokens where they are given): the best one "
                "cannot be found; run several of both in some groups"
            )


def _tempered(residual: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``residual`` (not negative) and its ``slope`` for a Cauchy cost: beyond `ROBUST` it grows as slowly as a logarithm."""
    squared = 1 + (residual / ROBUST) ** 2
    cost = ROBUST * np.sqrt(np.log(squared))
    return cost, slope * np.divide(residual / squared, cost, out=np.ones_like(cost), where=cost > 0)


@dataclass(frozen=True)
class _Problem:
    """A table as arrays, with its prior: parameters are mean + root @ z, where z has a standard Gaussian prior."""

    x: np.ndarray
    rate: np.ndarray
    batch: np.ndarray
    loss: np.ndarray
    group: np.ndarray
    log_n: np.ndarray
    log_sparsity: np.ndarray
    log_d: np.ndarray
    blown: tuple[np.ndarray, np.ndarray, np.ndarray]  # x, log lr, log B of diverged runs
    mean: np.ndarray
    root: np.ndarray

    def parameters(self, z: np.ndarray) -> np.ndarray:
        return self.mean + self.root @ z

    def level(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log of the loss at the optimum, its derivatives by the loss's parameters)."""
        return _level(p, self.log_n, self.log_sparsity, self.log_d)

    def unexplained(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(height above the optimum, log loss minus height and level) of each run."""
        p = self.parameters(z)
        height = _shape(p[_LAW:_BOWL], self.rate - self.x @ p[:4], self.batch - self.x @ p[4:_LAW])
        return height, self.loss - height - self.level(p)[0]

    def too_low(self, p: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """By how much the surface is too low at each run ``[finished + diverged]``, in deviations of a loss, and the
        derivatives of that by the laws of lr* and B* and by the shape.

        Diverged runs are higher than `WINDOW`. One that is far too low counts no more than an outlier, because a run can
        also blow up by accident, where its neighbors end well. No finished run is lower than the optimum by more than the
        noise. The cubic alone does not ensure this: where losses fall towards the edge of the runs, it can follow them down
        and place its optimum on the other side.
        """
        parts, slopes = [], []
        finished = self.x, self.rate, self.batch
        for (x, rate, batch), least, unit in ((finished, -noise, noise), (self.blown, WINDOW, NOISE)):
            low = least - _shape(p[_LAW:_BOWL], rate - x @ p[:4], batch - x @ p[4:_LAW])
            below, by_below = np.maximum(0, low) / unit, np.where(low > 0, 1 / unit, 0.0)
            if x is self.blown[0]:
                below, by_below = _tempered(below, by_below)
            parts.append(below)
            slopes.append(-by_below[:, None] * _slopes(p, x, rate, batch))
        return np.concatenate(parts), np.concatenate(slopes)

    def by_group(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.group, values)

    def offsets(self, error: np.ndarray, weight: np.ndarray, spread: float) -> np.ndarray:
        """Each group's offset, which is shrunk towards 0 the more, the less its runs say."""
        return self.by_group(weight * error) / (self.by_group(weight) + 1 / spread**2)

    def residuals(self, z: np.ndarray, weight: np.ndarray, spread: float, noise: float) -> np.ndarray:
        _, error = self.unexplained(z)
        offset = self.offsets(error, weight, spread)
        too_low, _ = self.too_low(self.parameters(z), noise)
        return np.concatenate([np.sqrt(weight) * (error - offset[self.group]), offset / spread, too_low, z])

    def jacobian(self, z: np.ndarray, weight: np.ndarray, spread: float, noise: float) -> np.ndarray:
        p = self.parameters(z)
        heights = _slopes(p, self.x, self.rate, self.batch)
        error = -np.concatenate([heights, self.level(p)[1]], axis=1) @ self.root
        offset = np.stack([self.offsets(column, weight, spread) for column in error.T], axis=1)
        too_low = self.too_low(p, noise)[1] @ self.root[:_BOWL]
        return np.concatenate(
            [np.sqrt(weight)[:, None] * (error - offset[self.group]), offset / spread, too_low, np.eye(len(z))]
        )


def _sizes(n_total: Any, n_active: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log of N_active, of N_total / N_active, and of D), in the loss's units."""
    n_total, n_active, tokens = (np.atleast_1d(np.asarray(value, dtype=float)) for value in (n_total, n_active, tokens))
    return np.log(n_active / 1e9), np.log(n_total / n_active), np.log(tokens / 1e10)


def _level(
    p: np.ndarray, log_active: np.ndarray, log_sparsity: np.ndarray, log_d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(log of the loss at the optimum, its derivatives by the loss's parameters)."""
    log_e, log_a, log_b, a, b, share = p[_BOWL:]
    log_n = log_active + share * log_sparsity
    terms = [np.full_like(log_n, np.exp(log_e)), np.exp(log_a - a * log_n), np.exp(log_b - b * log_d)]
    total = sum(terms)
    e, by_n, by_d = (term / total for term in terms)
    slopes = [e, by_n, by_d, -by_n * log_n, -by_d * log_d, -by_n * a * log_sparsity]
    return np.log(total), np.stack(slopes, axis=1)


def _slopes(p: np.ndarray, x: np.ndarray, rate: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Derivatives of runs' heights by the laws of lr* and B* and by the shape."""
    q, u, v = p[_LAW:_BOWL], rate - x @ p[:4], batch - x @ p[4:_LAW]
    first, last = np.exp(q[0]), np.exp(q[2])
    f, g = first * u, q[1] * u + last * v
    by_u = 2 * f * first + 2 * g * q[1] + 3 * q[3] * u**2 + 2 * q[4] * u * v + q[5] * v**2
    by_v = 2 * g * last + q[4] * u**2 + 2 * q[5] * u * v + 3 * q[6] * v**2
    by_q = np.stack([2 * f**2, 2 * g * u, 2 * g * last * v, u**3, u**2 * v, u * v**2, v**3], axis=1)
    return np.concatenate([-by_u[:, None] * x, -by_v[:, None] * x, by_q], axis=1)


def _problem(finished: pd.DataFrame, blown: pd.DataFrame, prior: Prior) -> _Problem:
    def logs(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rate, batch = (np.log(frame[c].to_numpy(float)) for c in ("learning_rate", "batch_tokens"))
        return _features(frame["n_total"], frame["n_active"], frame["tokens"]), rate, batch

    root = np.zeros((_LOSS, _LOSS))
    root[:4, :4], root[4:_LAW, 4:_LAW] = (np.linalg.cholesky(cov) for _, cov in (prior.learning_rate, prior.batch))
    root[_LAW:, _LAW:] = np.diag(np.concatenate([_SHAPE_DEVIATION, _LOSS_DEVIATION]))
    x, rate, batch = logs(finished)
    log_n, log_sparsity, log_d = _sizes(finished["n_total"], finished["n_active"], finished["tokens"])
    return _Problem(
        x=x,
        rate=rate,
        batch=batch,
        loss=np.log(finished["loss"].to_numpy(float)),
        group=pd.factorize(finished["group"])[0],
        log_n=log_n,
        log_sparsity=log_sparsity,
        log_d=log_d,
        blown=logs(blown),
        mean=np.concatenate([prior.learning_rate[0], prior.batch[0], _SHAPE_MEAN, _LOSS_MEAN]),
        root=root,
    )


def _begin(problem: _Problem, start: Surface | None) -> np.ndarray:
    """z of ``start``, or of the prior's slopes through the middle of the groups' best runs."""
    p = problem.mean.copy()
    if start is not None:
        p[:_BOWL] = [*start.learning_rate, *start.batch, *start.shape]
    else:
        order = np.lexsort((problem.loss, problem.group))
        best = order[np.unique(problem.group[order], return_index=True)[1]]
        p[0] += np.median(problem.rate[best] - problem.x[best] @ p[:4])
        p[4] += np.median(problem.batch[best] - problem.x[best] @ p[4:_LAW])
    return np.linalg.solve(problem.root, p - problem.mean)


@dataclass(frozen=True)
class _Solution:
    """z at the optimum, the Jacobian there, each run's weight, the deviation of the groups' offsets and the noise."""

    z: np.ndarray
    jacobian: np.ndarray
    weight: np.ndarray
    spread: float
    noise: float


def _noise(left: np.ndarray, rough: np.ndarray, freedom: np.ndarray, noise: float) -> float:
    """A better estimate of the noise than ``noise``, from what is left of each run's log loss. ``rough``: the deviations
    that grow with the height. ``freedom``: 1 minus each run's leverage, the share of its error that the fit leaves."""
    variance = noise**2 + rough**2
    near = (noise**2 / variance) ** 2  # runs far from the optimum say little about the noise
    found = np.minimum(left**2 / freedom, ROBUST**2 * variance) / _CLIPPED - rough**2
    known = float(np.sum(near * found)) + NOISE_WEIGHT * NOISE**2
    return float(np.sqrt(max(NOISE**2, known / (np.sum(near) + NOISE_WEIGHT))))


def _leverage(jacobian: np.ndarray, runs: int) -> np.ndarray:
    """By how much each run's own loss moves the fit at the run."""
    rows = jacobian[:runs]
    return np.einsum("ij,ji->i", rows, np.linalg.solve(jacobian.T @ jacobian, rows.T))


def _reweighted(problem: _Problem, z: np.ndarray) -> _Solution:
    """Weights and the offsets' spread are estimated and the fit repeated in turn."""
    best = np.full(problem.group.max() + 1, np.inf)
    np.minimum.at(best, problem.group, problem.loss)
    height = problem.loss - best[problem.group]
    weight, spread, noise = 1 / (NOISE**2 + (ROUGH * np.maximum(height, 0.01)) ** 2), OFFSET, NOISE
    jacobian, last, settled = np.zeros((0, 0)), (weight, spread, noise), False
    for _ in range(_ROUNDS):
        last = (weight, spread, noise)
        found = least_squares(problem.residuals, z, problem.jacobian, method="lm", args=last, max_nfev=30)
        moved, z, jacobian = np.abs(found.x - z).max(), found.x, found.jac
        if moved < _CLOSE and settled:
            break
        height, error = problem.unexplained(z)
        offset = problem.offsets(error, weight, spread)
        left = error - offset[problem.group]
        uncertain = 1 / (problem.by_group(weight) + 1 / spread**2)
        leverage = weight * uncertain[problem.group] + _leverage(jacobian, len(left))
        noise = _noise(left, ROUGH * np.maximum(0, height), (1 - leverage).clip(0.1), noise)
        settled = abs(noise / last[2] - 1) < 0.05
        variance = noise**2 + (ROUGH * np.maximum(0, np.maximum(height, height + left))) ** 2
        weight = 1 / variance / np.sqrt(1 + left**2 / variance / ROBUST**2)
        known = float(np.sum(offset**2 + uncertain)) + OFFSET_WEIGHT * OFFSET**2
        spread = float(np.sqrt(known / (len(offset) + OFFSET_WEIGHT)))
    return _Solution(z, jacobian, *last)


def _solved(frame: pd.DataFrame, start: Surface | None, prior: Prior | None) -> tuple[_Problem, _Solution]:
    finished, blown = frame[~frame["diverged"]], frame[frame["diverged"]]
    _check(finished)
    prior = (laboratory_prior() if prior is None else prior).widened(_free(finished))
    problem = _problem(finished, blown, prior)
    return problem, _reweighted(problem, _begin(problem, start))


def fit_surface(frame: pd.DataFrame, start: Surface | None = None, prior: Prior | None = None) -> Surface:
    """Fit the surface to the finished runs. Diverged runs are censored: the surface must be at least `WINDOW` high there.
    ``prior``: by default that of all laboratories. Raises InputError if the runs are too few."""
    return _surface(*_solved(frame, start, prior))


def _surface(problem: _Problem, solution: _Solution) -> Surface:
    p, jacobian = problem.parameters(solution.z), solution.jacobian
    covariance = problem.root @ np.linalg.inv(jacobian.T @ jacobian) @ problem.root.T
    share = (np.diag(covariance)[:_LAW] / np.diag(problem.root @ problem.root.T)[:_LAW]).clip(0, 1)
    weights = {"learning_rate": share[:4].tolist(), "batch": share[4:].tolist()}
    assumed = [name for place, name in enumerate(FEATURES) if place and max(share[place], share[place + 4]) > ASSUMED]
    return Surface(
        learning_rate=p[:4].tolist(),
        batch=p[4:_LAW].tolist(),
        shape=p[_LAW:_BOWL].tolist(),
        held=assumed,
        prior_share=weights,
        noise=solution.noise,
    )


@dataclass(frozen=True)
class Posterior:
    """What a table tells, as a Gaussian around the fit: P parameters (the laws of lr* and B*, the shape, the loss), and two
    kinds of deviations from them: of each group's log loss (G groups), and of log lr* and log B* of each size (S sizes).

    ``covariance [P + G + 2 S, P + G + 2 S]``. ``groups`` and ``sizes``: the places of their deviations, by (n_total,
    n_active, tokens) and by (n_total, n_active). ``spread``: the standard deviation of a new group's.
    """

    surface: Surface
    parameters: np.ndarray
    covariance: np.ndarray
    groups: dict[tuple[float, float, float], int]
    sizes: dict[tuple[float, float], int]
    spread: float

    def slopes(self, n_total: float, n_active: float, tokens: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Derivatives ``[runs, P]`` of the log loss of one group's runs, whose log learning rate and log batch are ``u`` and
        ``v`` above the optimum."""
        p, x = self.parameters, _features(n_total, n_active, tokens)
        rate, batch = x @ p[:4] + u, x @ p[4:_LAW] + v
        level = _level(p, *_sizes(n_total, n_active, tokens))[1]
        heights = _slopes(p, np.repeat(x, len(u), axis=0), rate, batch)
        return np.concatenate([heights, np.repeat(level, len(u), axis=0)], axis=1)

    def token_exponent(self, n_total: float, n_active: float, tokens: float) -> float:
        """By what share the loss falls per share of more tokens, - d log L / d log D, at a model's own optimum."""
        by_d = _level(self.parameters, *_sizes(n_total, n_active, tokens))[1][0, 2]  # the share of the term B / D^b
        return float(by_d * self.parameters[_BOWL + 4])


def posterior(frame: pd.DataFrame, prior: Prior | None = None, misfit: tuple[float, float] = MISFIT) -> Posterior:
    """`fit_surface` with the uncertainty of what it found. ``misfit``: standard deviations of log lr* and log B* of a size
    from the laws; with zeros, the covariance is the fit's own. Raises InputError."""
    problem, solution = _solved(frame, None, prior)
    p = problem.parameters(solution.z)
    finished = frame[~frame["diverged"]]
    sizes = finished.groupby(["n_total", "n_active"], sort=False).ngroup().to_numpy()
    groups, count = int(problem.group.max()) + 1, int(sizes.max()) + 1
    heights = _slopes(p, problem.x, problem.rate, problem.batch)
    by_size = np.zeros((len(sizes), count, 2))
    by_size[np.arange(len(sizes)), sizes] = heights[:, [0, 4]] * np.array(misfit)  # in units of the misfit
    rows = [
        heights,
        problem.level(p)[1],
        np.eye(groups)[problem.group] * solution.spread,
        by_size.reshape(len(sizes), -1),
    ]
    design = np.concatenate(rows, axis=1)
    information = np.eye(design.shape[1])
    information[:_LOSS, :_LOSS] = np.linalg.inv(problem.root @ problem.root.T)
    information += design.T @ (solution.weight[:, None] * design)
    _, censored = problem.too_low(p, solution.noise)
    information[:_BOWL, :_BOWL] += censored.T @ censored
    unit = np.concatenate([np.ones(_LOSS), np.full(groups, solution.spread), np.tile(misfit, count)])
    keys = finished[["n_total", "n_active", "tokens"]].to_numpy(float)
    return Posterior(
        surface=_surface(problem, solution),
        parameters=p,
        covariance=unit[:, None] * np.linalg.inv(information) * unit,
        groups={(n, active, d): _LOSS + int(g) for (n, active, d), g in zip(keys, problem.group, strict=True)},
        sizes={(n, active): _LOSS + groups + 2 * int(s) for (n, active, _), s in zip(keys, sizes, strict=True)},
        spread=solution.spread,
    )
