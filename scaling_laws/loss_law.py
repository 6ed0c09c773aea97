"""Loss as a function of size and data: forms, and their fit by Huber on log loss from informed starts.

Forms (N, D in units of 1e9, 1e10; all positive parameters as logarithms):

* ``chinchilla``  E + A / N^a + B / D^b, N = N_active (arXiv 2203.15556)
* ``effective``   the same with N = N_active^(1 - w) N_total^w, 0 <= w <= 1: one exponent for sparse and dense models
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from scaling_laws.errors import InputError

UNIT_N, UNIT_D = 1e9, 1e10
DELTA = 1e-3  # Huber's, of log loss, as in arXiv 2203.15556
FORMS = ("chinchilla", "effective")


@dataclass(frozen=True, kw_only=True)
class LossLaw:
    """A fitted form. ``a``, ``b`` exponents of N and D; ``big_a``, ``big_b`` in units of 1e9 parameters, 1e10 tokens;
    ``weight`` is w of ``effective``. ``objective``: summed Huber cost; ``spread``: of the exponents over the starts that
    reached it; ``condition``: of the Jacobian at the optimum."""

    form: str
    e: float
    big_a: float
    big_b: float
    a: float
    b: float
    weight: float
    objective: float
    starts: int
    spread: float
    condition: float

    def predict(self, n_total: Any, n_active: Any, tokens: Any) -> np.ndarray:
        """Loss in nats per token."""
        n = _effective(np.asarray(n_total, float), np.asarray(n_active, float), self.weight) / UNIT_N
        d = np.asarray(tokens, float) / UNIT_D
        return self.e + self.big_a * n**-self.a + self.big_b * d**-self.b

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _effective(n_total: np.ndarray, n_active: np.ndarray, weight: float) -> np.ndarray:
    return n_active ** (1 - weight) * n_total**weight


def _starts(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> list[np.ndarray]:
    """For a few exponents, the rest by non-negative least squares (variable projection)."""
    found = []
    for a in (0.2, 0.35, 0.5, 0.8):
        for b in (0.3, 0.45):
            columns = np.stack([np.ones_like(n), n**-a, d**-b], axis=1)
            linear, _ = nnls(columns / loss[:, None], np.ones_like(loss))
            linear = np.maximum(linear, 1e-3 * loss.min())
            found.append(np.array([*np.log(linear), np.log(a), np.log(b)]))
    return found


def fit_loss(
    n_total: np.ndarray,
    n_active: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    form: str = "chinchilla",
    start: LossLaw | None = None,
) -> LossLaw:
    """Fit ``form`` to losses (nats per token). With ``start``, only from there (for resampling). Raises InputError for fewer
    points than parameters."""
    parameters = 6 if form == "effective" else 5
    points = len({(n, m, d) for n, m, d in zip(n_total, n_active, tokens, strict=True)})
    if points < parameters:
        raise InputError(
            f"{points} different (N, D) cannot fix the {parameters} parameters of the loss law {form}: add sizes and "
            "durations"
        )
    target = np.log(loss)
    d = np.asarray(tokens, float) / UNIT_D
    with_weight = form == "effective"

    def unpack(p: np.ndarray) -> tuple[float, float, float, float, float, float]:
        weight = 1 / (1 + np.exp(-p[5])) if with_weight else 0.0
        return (*np.exp(p[:5]), weight)

    def model(p: np.ndarray) -> np.ndarray:
        e, big_a, big_b, a, b, weight = unpack(p)
        n = _effective(n_total, n_active, weight) / UNIT_N
        return np.log(e + big_a * n**-a + big_b * d**-b)

    if start is not None:
        values = [start.e, start.big_a, start.big_b, start.a, start.b]
        logit = np.log(max(start.weight, 1e-6) / max(1 - start.weight, 1e-6))
        starts = [np.array([*np.log(np.maximum(values, 1e-9)), *([logit] if with_weight else [])])]
    else:
        n = _effective(n_total, n_active, 0.4 if with_weight else 0.0) / UNIT_N
        starts = [np.append(p, -0.4) if with_weight else p for p in _starts(n, d, loss)]
    lower = np.array([np.log(1e-3), -12, -12, np.log(0.02), np.log(0.02), *([-8] if with_weight else [])])
    upper = np.array([np.log(loss.min()), 12, 12, np.log(3.0), np.log(3.0), *([8] if with_weight else [])])
    residual: Callable[[np.ndarray], np.ndarray] = lambda p: model(p) - target  # noqa: E731
    fits = []
    for p in starts:
        p = np.clip(p, lower + 1e-9, upper - 1e-9)
        fits.append(least_squares(residual, p, loss="huber", f_scale=DELTA, bounds=(lower, upper), x_scale="jac"))
    best = min(fits, key=lambda fit: fit.cost)
    reached = np.array([fit.x[3:5] for fit in fits if fit.cost <= best.cost * 1.001 + 1e-12])
    e, big_a, big_b, a, b, weight = unpack(best.x)
    singular = np.linalg.svd(best.jac, compute_uv=False)
    return LossLaw(
        form=form,
        e=float(e),
        big_a=float(big_a),
        big_b=float(big_b),
        a=float(a),
        b=float(b),
        weight=float(weight),
        objective=float(best.cost),
        starts=len(starts),
        spread=float(np.ptp(np.exp(reached), axis=0).max()),
        condition=float(singular[0] / max(singular[-1], 1e-300)),
    )


def compute_optimal(law: LossLaw, flops: float, ratio: float = 1.0) -> tuple[float, float, float]:
    """(N_total, tokens, loss) of least loss for ``flops`` = 6 N_active D, at N_active = ratio * N_total."""
    n_active = np.geomspace(1e6, 1e14, 4001)
    tokens = flops / (6 * n_active)
    loss = law.predict(n_active / ratio, n_active, tokens)
    best = int(np.argmin(loss))
    return float(n_active[best] / ratio), float(tokens[best]), float(loss[best])
