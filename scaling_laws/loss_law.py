"""Loss as a function of model and data: one of `scaling_laws.forms`, fitted to log loss with a Huber cost."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import huber

from scaling_laws.errors import InputError
from scaling_laws.forms import FORMS, Form, Points, points
from scaling_laws.laboratories import LOSS_BETWEEN
from scaling_laws.surface_fit import OFFSET, OFFSET_WEIGHT

DELTA = 1e-3  # of the Huber cost on log loss, as in arXiv 2203.15556
SEARCHED = (1e2, 1e18)  # activated parameters, among which the compute-optimal size is
MOST_STEPS = 200  # of one search; parameters that the runs do not determine would drift for thousands
SEARCHED = (1e2, 1e18)  # activated parameters, among which the compute-optimal size is searched


@dataclass(frozen=True, kw_only=True)
class LossLaw:
    """A fitted form and its ``values`` by name, in units of 1e9 parameters and 1e10 tokens. ``objective`` is the summed
    Huber cost, ``spread`` the range of exponents among the starts that reached it, ``condition`` the Jacobian's there."""

    form: str
    values: dict[str, float]
    objective: float
    starts: int
    spread: float
    condition: float

    def at(self, where: Points) -> np.ndarray:
        """Loss in nats per token."""
        form = FORMS[self.form]
        return form.predict(np.array([self.values[name] for name in form.names]), where)

    def predict(self, n_total: Any, n_active: Any, tokens: Any, **others: Any) -> np.ndarray:
        """`at` for numbers or arrays. ``others`` may be granularity and unique_tokens."""
        return self.at(points(n_total, n_active, tokens, **others))

    @property
    def text(self) -> str:
        return FORMS[self.form].text.format(**self.values)

    def deviation(self, where: Points, loss: np.ndarray) -> float:
        """The standard deviation of log ``loss`` around this law, fitted to it. Few points are expected to be as far from
        their law as those of other tables."""
        left = np.log(loss / self.at(where))
        freedom = max(0, len(left) - len(self.values))
        return float(np.sqrt((np.sum(left**2) + OFFSET_WEIGHT * OFFSET**2) / (freedom + OFFSET_WEIGHT)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _search_space(
    form: Form, loss: np.ndarray
) -> tuple[Callable[..., Any], Callable[..., Any], np.ndarray, np.ndarray]:
    """(function to search coordinates, its inverse, lower bounds, upper bounds)."""
    positive, share = (np.array([kind == which for kind in form.kinds]) for which in ("positive", "share"))

    def forth(p: np.ndarray) -> np.ndarray:
        x = p.copy()
        x[positive] = np.log(p[positive])
        x[share] = np.log(p[share] / (1 - p[share]))
        return x

    def back(x: np.ndarray) -> np.ndarray:
        p = x.copy()
        p[positive] = np.exp(x[positive])
        p[share] = 1 / (1 + np.exp(-x[share]))
        return p

    low, high = (np.array(side, float) for side in zip(*form.bounds, strict=True))
    if form.names[0] == "e":
        high[0] = loss.min()
    return forth, back, forth(low), forth(high)


def _expected(form: Form, exponents: tuple[float, float], deviation: float) -> list[tuple[int, float, float]]:
    """(place, log, weight) of each parameter that is expected to have a value, where losses have a ``deviation``. The square
    of such a residual is weighed against Huber costs, which grow with |x| times `DELTA` beyond it, not with x^2."""
    scale = float(np.sqrt(deviation * min(deviation, DELTA)))
    return [
        (form.names.index(name), float(np.log(value)), scale / between)
        for name, value, between in zip(("a", "b"), exponents, LOSS_BETWEEN, strict=True)
    ]


def _cost(losses: int) -> Callable[[np.ndarray], np.ndarray]:
    """For `least_squares`: Huber's cost of the first residuals, which are of ``losses``, and the plain square of others."""

    def cost(squares: np.ndarray) -> np.ndarray:
        far = (squares > 1) & (np.arange(len(squares)) < losses)
        root = np.sqrt(np.where(far, squares, 1.0))
        return np.stack([np.where(far, 2 * root - 1, squares), 1 / root, np.where(far, -0.5 / root**3, 0.0)])

    return cost


def _check(form: Form, where: Points, loss: np.ndarray) -> None:
    distinct = distinct_points(where)
    if distinct < len(form.names):
        raise InputError(
            f"{distinct} different (N, D) do not determine the {len(form.names)} parameters of the loss law {form.name}: "
            "add sizes and durations"
        )
    if why := form.untold(where):
        raise InputError(f"the loss law {form.name} cannot be fitted: {why}")
    if np.ptp(loss) == 0:
        raise InputError(f"all losses are {loss[0]:g}: nothing can be fitted to losses that do not differ")
    if form.names[0] == "e" and not loss.min() > form.bounds[0][0]:
        raise InputError(f"the least loss is {loss.min():.3g}, and a loss law needs losses above {form.bounds[0][0]:g}")


def distinct_points(where: Points) -> int:
    """The number of different points: a form with more parameters is not determined by them."""
    return len({*zip(*(getattr(where, name) for name in Points.__dataclass_fields__), strict=True)})


def fit_loss(
    where: Points,
    loss: np.ndarray,
    form: str = "chinchilla",
    start: LossLaw | None = None,
    exponents: tuple[float, float] | None = None,
) -> LossLaw:
    """Fit ``form`` to losses (nats per token). With ``start`` the search starts only there, for resampling. With
    ``exponents``, the law's a and b, where it has them, are expected to be these, give or take `LOSS_BETWEEN`. Raises
    InputError if the points do not determine the form."""
    law = FORMS[form]
    _check(law, where, loss)
    forth, back, lower, upper = _search_space(law, loss)
    begin = law.starts(where, loss) if start is None else [np.array([start.values[name] for name in law.names])]
    target = np.log(loss)
    expected = []
    if exponents is not None and {"a", "b"} <= set(law.names):
        free = start or fit_loss(where, loss, form)
        if start is None:
            begin.append(np.array([free.values[name] for name in law.names]))
        expected = _expected(law, exponents, free.deviation(where, loss))

    def left(x: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(law.predict(back(x), where), 1e-12)) - target

    def residual(x: np.ndarray) -> np.ndarray:
        return np.append(left(x), [weight * (x[place] - value) for place, value, weight in expected])

    steps = 1e-7 * np.eye(len(law.names))

    def jacobian(x: np.ndarray) -> np.ndarray:
        # Forward differences of all parameters in one call: forms are elementwise.
        moved = np.log(np.maximum(law.predict(back((x + steps).T[:, :, None]), where), 1e-12))
        pulls = [weight * np.eye(len(x))[place] for place, _, weight in expected]
        return np.vstack([((moved - target - left(x)) / 1e-7).T, *pulls])

    fits, cost = [], _cost(len(loss))
    for p in begin:
        low, high = (np.array(side, float) for side in zip(*law.bounds, strict=True))
        x = np.clip(forth(np.clip(p, low, high)), lower + 1e-9, upper - 1e-9)
        options: dict[str, Any] = {"f_scale": DELTA, "bounds": (lower, upper), "x_scale": "jac"}
        fits.append(least_squares(residual, x, jacobian, loss=cost, max_nfev=MOST_STEPS, **options))
    best = min(fits, key=lambda fit: fit.cost)
    reached = np.array([back(fit.x) for fit in fits if fit.cost <= best.cost * 1.001 + 1e-12])
    compared = [law.names.index(name) for name in law.exponents]
    singular = np.linalg.svd(best.jac, compute_uv=False)
    return LossLaw(
        form=form,
        values=dict(zip(law.names, back(best.x).tolist(), strict=True)),
        objective=float(huber(DELTA, left(best.x)).sum()),
        starts=len(begin),
        spread=float(np.ptp(reached[:, compared], axis=0).max()),
        condition=float(singular[0] / max(singular[-1], 1e-300)),
    )


def compute_optimal(law: LossLaw, flops: float, ratio: float = 1.0, **others: Any) -> tuple[float, float, float]:
    """(N_total, tokens, loss) with the least loss for ``flops`` = 6 N_active D and N_active = ratio * N_total. ``others``:
    see `LossLaw.predict`. Raises InputError if the loss falls to the end of the search: then there is no such size."""
    n_active = np.geomspace(*SEARCHED, 8001)
    tokens = flops / (6 * n_active)
    loss = law.predict(n_active / ratio, n_active, tokens, **others)
    best = int(np.argmin(np.where(np.isfinite(loss), loss, np.inf)))
    if best in (0, len(loss) - 1):
        other = "larger model with fewer tokens" if best else "smaller model with more tokens"
        raise InputError(
            f"the loss law has no compute-optimal size for {flops:.3g} FLOPs: by it, a {other} always has a lower loss. The "
            "runs do not determine it (sizes at several durations would), or the FLOPs are far beyond them: give --n-total "
            "and --tokens"
        )
    return float(n_active[best] / ratio), float(tokens[best]), float(loss[best])
