"""Predicts a running run's final loss from its curve so far and its learning rates to the end.

Let u be the learning rate over its peak, S(t) the sum of u up to step t, and du_k = u_{k-1} - u_k its decrease. Then

    L(t) = L0 + A S(t)^-alpha - B sum_k du_k G_k(t)

    tissue       G_k(t) = 1 - exp(-(t - k) / tau)                            arXiv 2408.11029, lambda = exp(-1 / tau)
    multi_power  G_k(t) = 1 - (1 + C u_k^-gamma (S(t) - S(k)))^-beta         arXiv 2503.12811

A run whose learning rate has not decreased yet does not determine B and G. Their prior comes from finished runs (``like``)
or from published fits, and is wider for the latter. Both laws are fitted; their difference widens the interval.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from scaling_laws.counted import counted
from scaling_laws.errors import InputError
from scaling_laws.table_file import hint_of_names, plain, read_rows

LAWS = ("tissue", "multi_power")
KNOTS, BINS = 300, 50
LEAST_STEPS, LEAST_SHARE = 30, 0.05
# Relative error that more steps do not remove: the losses in a bin are not quite independent, and no law is exact.
MODEL_ERROR = 1e-3
BLEW_UP = 0.05  # the newest losses over the fitted curve: more are no noise, and a law counts them as outliers
LEAST_LOSS, MOST_LOSS = 2e-3, 1e3  # nats per token, of a median: others are in other units


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss curve. ``learning_rate`` has every step of the whole run, ``loss`` the steps done so far (nats per token; NaN
    where it was not recorded). ``name`` is for messages."""

    name: str
    learning_rate: np.ndarray
    loss: np.ndarray

    @property
    def done(self) -> float:
        """Share of the run's steps."""
        return len(self.loss) / len(self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The ``final`` loss with its 95% interval ``low`` to ``high``, and each law's prediction alone. ``backtest`` is the
    relative error when the end of the known curve is predicted from its first two thirds. ``newest``: the newest losses
    over the fitted curve, less 1; a run that blew up is far above it."""

    final: float
    low: float
    high: float
    by_law: dict[str, float]
    backtest: float | None
    newest: float = 0.0

    @property
    def blew_up(self) -> bool:
        return self.newest > BLEW_UP


# (medians, standard deviations) of the prior. The parameters are the logs of L0, A, alpha, B, then tau or C, beta, gamma.
# L0 and A are left to the data. alpha, B, beta and gamma are near the fits of arXiv 2503.12811 for 25M to 400M parameters.
_PRIOR = {
    "tissue": (np.log([1.0, 1.0, 0.5, 0.12, 1.0]), np.array([np.inf, np.inf, 0.35, 0.7, 1.0])),
    "multi_power": (np.log([1.0, 1.0, 0.5, 0.12, 1.0, 0.6, 0.6]), np.array([np.inf, np.inf, 0.35, 0.7, 1.5, 0.2, 0.2])),
}
_SHARED = {"tissue": (2, 3, 4), "multi_power": (2, 3, 4, 5, 6)}  # the parameters that are learnt from finished runs


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """A curve reduced to few points: mean losses in bins, and the learning rate at knots."""

    at: np.ndarray  # steps of the mean losses, then the run's last step
    loss: np.ndarray
    error: np.ndarray
    knot: np.ndarray  # steps
    fall: np.ndarray  # du at the knots
    u: np.ndarray
    s_at: np.ndarray
    s_knot: np.ndarray
    steps: int


def _grid(curve: Curve, known: int) -> _Grid:
    rate = curve.learning_rate / curve.learning_rate.max()
    steps = len(rate)
    s = np.cumsum(rate)
    warm = int(np.argmax(rate >= 0.999 * rate.max()))
    first = min(max(warm, int(0.01 * steps), 2), known - LEAST_STEPS // 2)
    loss = curve.loss[:known]
    jumps = np.diff(loss)
    noise = math.sqrt(np.nanmedian(jumps**2) / 0.455 / 2)  # by the median of chi-squared, which outliers do not move
    edges = np.unique(np.geomspace(first + 1, known + 1, BINS + 1).round().astype(int)) - 1
    at, means, errors = [], [], []
    for low, high in itertools.pairwise(edges):
        part = loss[low:high]
        part = part[np.isfinite(part)]
        if len(part):
            # Spikes are not part of the trend.
            part = np.clip(part, None, np.median(part) + 5 * noise)
            at.append((low + high - 1) / 2)
            means.append(part.mean())
            errors.append(noise / math.sqrt(len(part)))
    every = np.arange(steps)
    where = np.array([*at, steps - 1])
    knot = np.unique(np.linspace(warm, steps - 1, KNOTS).round().astype(int))
    u = rate[knot]
    mean = np.array(means)
    return _Grid(
        at=where,
        loss=mean,
        error=np.hypot(np.array(errors), MODEL_ERROR * mean),
        knot=knot.astype(float),
        fall=np.concatenate([[0.0], -np.diff(u)]),
        u=np.maximum(u, 1e-4),
        s_at=np.interp(where, every, s),
        s_knot=s[knot],
        steps=steps,
    )


def _model(law: str, p: np.ndarray, grid: _Grid) -> np.ndarray:
    """Loss at ``grid.at``, for the logs ``p`` of the parameters."""
    base, scale, alpha, drop = np.exp(p[:4])
    power = base + scale * (grid.s_at / 100.0) ** -alpha
    if law == "tissue":
        since = np.maximum(grid.at[:, None] - grid.knot[None, :], 0.0)
        reached = -np.expm1(-since / (0.03 * grid.steps * np.exp(p[4])))
    else:
        since = np.maximum(grid.s_at[:, None] - grid.s_knot[None, :], 0.0)
        typical = 0.11 * math.sqrt(30_000 / grid.steps)
        speed = typical * np.exp(p[4]) * grid.u ** -np.exp(p[6])
        reached = 1 - (1 + speed * since) ** -np.exp(p[5])
    return np.clip(power - drop * (reached @ grid.fall), -1e3, 1e3)  # the search needs finite numbers everywhere


def _fit(law: str, grid: _Grid, prior: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(most likely parameters, their covariance)."""
    centre, width = prior

    def residual(p: np.ndarray) -> np.ndarray:
        fit = (_model(law, p, grid)[:-1] - grid.loss) / grid.error
        return np.concatenate([fit, ((p - centre) / width)[2:]])

    least, first = grid.loss.min(), grid.loss[0]
    low, high = np.full(len(centre), -8.0), np.full(len(centre), 8.0)
    low[0], high[0] = math.log(0.02 * least), math.log(1.2 * least)
    best = None
    for share in (0.5, 0.75, 0.9):
        p = centre.copy()
        p[0] = math.log(share * least)
        p[1] = math.log(max(first - share * least, 1e-3) * (grid.s_at[0] / 100.0) ** math.exp(centre[2]))
        found = least_squares(residual, np.clip(p, low + 1e-6, high - 1e-6), bounds=(low, high), loss="soft_l1")
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    free = len(grid.loss) - 2
    misfit = max(1.0, 2 * best.cost / max(free, 1))  # a law that fits badly is trusted less
    hessian = best.jac.T @ best.jac
    return best.x, np.linalg.pinv(hessian, rcond=1e-12, hermitian=True) * misfit


def _learn(law: str, like: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The prior (medians, standard deviations) after learning from finished runs."""
    centre, width = (side.copy() for side in _PRIOR[law])
    if not like:
        return centre, width
    fits = [_fit(law, _grid(curve, len(curve.loss)), _PRIOR[law]) for curve in like]
    for place in _SHARED[law]:
        values = np.array([p[place] for p, _ in fits])
        own = np.mean([max(covariance[place, place], 0.0) for _, covariance in fits])
        between = values.var(ddof=1) if len(values) > 1 else 0.15**2
        centre[place] = values.mean()
        width[place] = min(width[place], max(0.1, math.sqrt(own + between)))
    return centre, width


def _predict(law: str, grid: _Grid, prior: tuple[np.ndarray, np.ndarray]) -> tuple[float, float, float]:
    """(loss at the last step, standard error, the newest losses over the law's)."""
    p, covariance = _fit(law, grid, prior)
    *_, now, at_end = map(float, _model(law, p, grid))
    gradient = np.array([(_model(law, p + step, grid)[-1] - at_end) / 1e-5 for step in 1e-5 * np.eye(len(p))])
    return at_end, math.sqrt(max(float(gradient @ covariance @ gradient), 0.0)), float(grid.loss[-1]) / now


def check_curve(curve: Curve) -> None:
    """Raises InputError for a curve that is too short or has no sensible numbers."""
    known = int(np.isfinite(curve.loss).sum())
    if known < LEAST_STEPS or curve.done < LEAST_SHARE:
        raise InputError(
            f"{curve.name}: {counted(known, 'loss')} in {curve.done:.1%} of the run {'is' if known == 1 else 'are'} too few "
            "to predict its end: at least "
            f"{LEAST_STEPS} and {LEAST_SHARE:.0%} are needed"
        )
    if len(curve.loss) > len(curve.learning_rate) or not (curve.learning_rate > 0).any():
        raise InputError(
            f"{curve.name}: expected a learning rate for every step to the run's end, some of them above 0"
        )
    if np.nanmin(curve.loss) <= 0:
        raise InputError(f"{curve.name}: a loss is {np.nanmin(curve.loss):g}, expected nats per token, above 0")
    if not LEAST_LOSS <= (middle := np.nanmedian(curve.loss)) <= MOST_LOSS:
        raise InputError(
            f"{curve.name}: the median loss is {middle:g}, expected nats per token, {LEAST_LOSS:g} to {MOST_LOSS:g}"
        )


def predict_final_loss(curve: Curve, like: Sequence[Curve] = ()) -> Prediction:
    """Fit both laws to the curve so far and evaluate them at the run's last step. ``like``: finished runs with the same
    model family, data and optimizer, which show how the loss falls as the learning rate does. Raises InputError."""
    for other in (curve, *like):
        check_curve(other)
    priors = {law: _learn(law, like) for law in LAWS}
    known = len(curve.loss)
    found = {law: _predict(law, _grid(curve, known), priors[law]) for law in LAWS}
    ends = np.array([end for end, _, _ in found.values()])
    variance = np.mean([error**2 for _, error, _ in found.values()]) + ends.var()
    final, error = float(ends.mean()), math.sqrt(float(variance))
    return Prediction(
        final=final,
        low=final - 1.96 * error,
        high=final + 1.96 * error,
        by_law={law: end for law, (end, _, _) in found.items()},
        newest=min(above for _, _, above in found.values()) - 1,
        backtest=_backtest(curve, priors),
    )


def _backtest(curve: Curve, priors: dict[str, tuple[np.ndarray, np.ndarray]]) -> float | None:
    known = len(curve.loss)
    part = int(known * 2 / 3)
    if part < 2 * LEAST_STEPS:
        return None
    shorter = Curve(name=curve.name, learning_rate=curve.learning_rate[:known], loss=curve.loss[:part])
    tail = curve.loss[-max(20, known // 20) :]
    guess = np.mean([_predict(law, _grid(shorter, part), priors[law])[0] for law in LAWS])
    return float(guess / np.nanmean(tail) - 1)


def _finite(value: object) -> float:
    number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError
    return number


def read_curve(path: Path) -> Curve:
    """Read a CSV with the columns step, learning_rate and loss and a row for every step of the whole run, or for every
    tenth, and so on; the loss of steps to come is empty. Raises InputError."""
    rows = list(read_rows(path))
    missing = [name for name in ("step", "learning_rate", "loss") if not rows or name not in rows[0][1]]
    if missing:
        hint = hint_of_names(missing, [name for name in (rows[0][1] if rows else ()) if plain(name) != "step"])
        raise InputError(f"{path} has no column {', '.join(missing)}: expected step, learning_rate, loss{hint}")
    rates, losses, steps = [], [], list[float]()
    for line, row in rows:
        try:
            rates.append(_finite(row["learning_rate"]))
            empty = row["loss"] is None or not str(row["loss"]).strip() or str(row["loss"]).strip().lower() == "nan"
            losses.append(math.nan if empty else _finite(row["loss"]))
            step = _finite(row["step"])
            if step < 0 or rates[-1] < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            given = ", ".join(f"{name} {str(row.get(name))[:40]!r}" for name in ("step", "learning_rate", "loss"))
            raise InputError(
                f"{path}:{line}: expected numbers for step, learning_rate and loss, which may be empty, not {given}"
            ) from None
        if steps and step <= steps[-1]:
            raise InputError(
                f"{path}:{line}: step {step:g} comes after step {steps[-1]:g}: give each step once, in order"
            )
        steps.append(step)
        apart = steps[1] - steps[0] if len(steps) > 1 else step
        if len(steps) > 2 and abs(step - steps[-2] - apart) > 1e-6 * step:
            raise InputError(
                f"{path}:{line}: step {step:g} comes after step {steps[-2]:g}, and the first rows are {apart:g} apart: give "
                "a row for every step to the run's end, with an empty loss where there is none"
            )
    if len(steps) > 1 and steps[0] > apart:
        raise InputError(
            f"{path}: its rows begin at step {steps[0]:g}: give those before, too, because the sum of the learning rates "
            "counts; their loss may be empty"
        )
    loss = np.array(losses)
    known = np.flatnonzero(np.isfinite(loss))
    end = int(known[-1]) + 1 if len(known) else 0
    return Curve(name=str(path), learning_rate=np.array(rates), loss=loss[:end])
