"""Functional forms of the loss: each is a function of a model and its data, with a few parameters.

N_a and N_t are activated and total parameters in units of 1e9, D is tokens in units of 1e10, x = N_t / N_a (1 for a dense
model), G is granularity, U is unique tokens:

    chinchilla        E + A/N_a^a + B/D^b                                                     arXiv 2203.15556
    effective         E + A/N^a + B/D^b,  N = N_a^(1-w) N_t^w                                 one N for sparse and dense
    farseer           exp(p N_a^-g + q) + exp(r N_a^h + s) D^(-exp(t N_a^k + v))              arXiv 2506.10972
    clark             E + A/N_a^(a + m ln x) x^-c + B/D^b                                     arXiv 2202.01169
    krajewski         E + (A + F/G^f)/N_a^a + B/D^b                                           arXiv 2402.07871
    abnar             E + A/N_t^a + B/D^b + C x^l + F x^m/N_t^f                               arXiv 2501.12370
    data_constrained  chinchilla of N' and D' that saturate when U is repeated                arXiv 2305.16264

Clark's law has neither E nor D, because its models all see the same amount of data, and its x saturates. Here E and D are
added and the saturation is left out; x counts parameters instead of experts, which covers top-k and shared experts.
Abnar's sparsity S is 1 - 1/x.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

UNIT_N, UNIT_D = 1e9, 1e10
# R_D* and R_N* of arXiv 2305.16264: after this many repetitions, the worth of one more has fallen to 1/e.
REPEATED_DATA, EXCESS_PARAMETERS = 15.4, 5.3


@dataclass(frozen=True, kw_only=True)
class Points:
    """Models and their data, as arrays of equal length. Unknown ``granularity`` is 1; unknown ``unique_tokens`` are
    ``tokens``."""

    n_total: np.ndarray
    n_active: np.ndarray
    tokens: np.ndarray
    granularity: np.ndarray
    unique_tokens: np.ndarray

    @property
    def n(self) -> np.ndarray:
        return self.n_active / UNIT_N

    @property
    def d(self) -> np.ndarray:
        return self.tokens / UNIT_D

    @property
    def sparsity(self) -> np.ndarray:
        """x in the module's docstring."""
        return self.n_total / self.n_active


def points(n_total: Any, n_active: Any, tokens: Any, granularity: Any = None, unique_tokens: Any = None) -> Points:
    """Points made of numbers or arrays, which are broadcast."""
    given = [n_total, n_active, tokens, 1.0 if granularity is None else granularity]
    given.append(tokens if unique_tokens is None else unique_tokens)
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, float)) for value in given))
    return Points(
        n_total=arrays[0],
        n_active=arrays[1],
        tokens=arrays[2],
        granularity=np.nan_to_num(arrays[3], nan=1.0),
        unique_tokens=np.where(np.isnan(arrays[4]), arrays[2], np.minimum(arrays[4], arrays[2])),
    )


def points_of(frame: pd.DataFrame) -> Points:
    """Points made of the rows of a table."""
    optional = [frame[c].to_numpy(float) if c in frame else None for c in ("granularity", "unique_tokens")]
    return points(*(frame[c].to_numpy(float) for c in ("n_total", "n_active", "tokens")), *optional)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form and its parameters. The ``kinds`` are "positive" (searched as logs), "share" (0 to 1, searched as logits) and
    "free", within ``bounds``. ``exponents`` names those that readers compare. ``starts`` gives parameter vectors to start
    the search from. ``untold`` returns why a table does not determine this form, or an empty string if it does."""

    name: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    exponents: tuple[str, ...]
    predict: Callable[[np.ndarray, Points], np.ndarray]
    starts: Callable[[Points, np.ndarray], list[np.ndarray]]
    untold: Callable[[Points], str]
    text: str


def _chinchilla(p: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    e, big_a, big_b, a, b = p[:5]
    return e + big_a * n**-a + big_b * d**-b


def _linear_starts(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> list[np.ndarray]:
    """Values of E, A, B, a, b: a few exponents, and the rest by non-negative least squares (variable projection)."""
    found = []
    for a in (0.2, 0.35, 0.5, 0.8):
        for b in (0.3, 0.45):
            columns = np.stack([np.ones_like(n), n**-a, d**-b], axis=1)
            linear, _ = nnls(columns / loss[:, None], np.ones_like(loss))
            found.append(np.array([*np.maximum(linear, 1e-3 * loss.min()), a, b]))
    return found


def _always(_: Points) -> str:
    return ""


def _distinct(values: np.ndarray) -> int:
    return len(np.unique(np.round(np.log(values), 2)))


def _needs_sparsities(points: Points) -> str:
    return "" if _distinct(points.sparsity) > 1 else "one sparsity only"


def _effective(p: np.ndarray, points: Points) -> np.ndarray:
    return _chinchilla(p, points.n * points.sparsity ** p[5], points.d)


def _farseer(p: np.ndarray, points: Points) -> np.ndarray:
    n = points.n
    exponent = np.exp(np.clip(p[5] * n ** p[7] + p[6], -5, 2))
    scale = np.clip(p[3] * n ** p[8] + p[4], -30, 30)
    return np.exp(np.clip(p[0] * n ** -p[2] + p[1], -30, 30)) + np.exp(scale) * points.d**-exponent


def _farseer_starts(points: Points, loss: np.ndarray) -> list[np.ndarray]:
    """Chinchilla's solution written in this form, with exponents that do not depend on N at first."""
    found = []
    for e, big_a, big_b, a, b in _linear_starts(points.n, points.d, loss)[::2]:
        for g in (0.15, 0.4):
            columns = np.stack([points.n**-g, np.ones_like(points.n)], axis=1)
            p, q = np.linalg.lstsq(columns, np.log(e + big_a * points.n**-a), rcond=None)[0]
            found.append(np.array([max(p, 1e-3), q, g, 0.0, np.log(big_b), 0.0, np.log(b), 0.2, 0.2]))
    return found


def _farseer_untold(points: Points) -> str:
    sizes = [_distinct(points.tokens[points.n_active == n]) for n in np.unique(points.n_active)]
    enough = sum(durations >= 3 for durations in sizes) >= 4
    return "" if enough else "it needs 4 sizes at 3 durations each"


def _clark(p: np.ndarray, points: Points) -> np.ndarray:
    n, log_x = points.n, np.log(points.sparsity)
    return p[0] + p[1] * n ** -(p[3] + p[6] * log_x) * np.exp(-p[5] * log_x) + p[2] * points.d ** -p[4]


def _krajewski(p: np.ndarray, points: Points) -> np.ndarray:
    return p[0] + (p[1] + p[5] * points.granularity ** -p[6]) * points.n ** -p[3] + p[2] * points.d ** -p[4]


def _abnar(p: np.ndarray, points: Points) -> np.ndarray:
    n, x = points.n_total / UNIT_N, points.sparsity
    return _chinchilla(p, n, points.d) + p[5] * x ** p[6] + p[7] * x ** p[8] * n ** -p[9]


def _saturate(unique: np.ndarray, total: np.ndarray, constant: float) -> np.ndarray:
    """The effective amount of ``total`` if only ``unique`` of it is new: equations 5 and 6 of arXiv 2305.16264."""
    repeated = np.maximum(total / unique - 1, 0.0)
    return unique * (1 + constant * -np.expm1(-repeated / constant))


def _data_constrained(p: np.ndarray, points: Points) -> np.ndarray:
    _, big_a, big_b, a, b, r_d, r_n = p
    unique = points.unique_tokens / UNIT_D
    # The size that is compute-optimal for the unique tokens (section 3.1 there); parameters beyond it saturate.
    balance = (a * big_a / (b * big_b)) ** (1 / (a + b))
    enough = np.clip((unique * balance) ** (b / a) * balance, 1e-6, 1e9)
    n = np.where(points.n > enough, _saturate(np.minimum(enough, points.n), points.n, r_n), points.n)
    return _chinchilla(p, n, _saturate(unique, points.d, r_d))


_E, _SCALE, _EXPONENT = (1e-3, 1e3), (6e-6, 1.6e5), (0.02, 3.0)
_BASE = ("e", "big_a", "big_b", "a", "b")
_BASE_BOUNDS = (_E, _SCALE, _SCALE, _EXPONENT, _EXPONENT)
CHINCHILLA = Form(
    name="chinchilla",
    names=_BASE,
    kinds=("positive",) * 5,
    bounds=_BASE_BOUNDS,
    exponents=("a", "b"),
    predict=lambda p, points: _chinchilla(p, points.n, points.d),
    starts=lambda points, loss: _linear_starts(points.n, points.d, loss),
    untold=_always,
    text="{e:.4f} + {big_a:.4f} / N_active^{a:.3f} + {big_b:.4f} / D^{b:.3f}",
)


def _extended(
    name: str,
    predict: Callable[[np.ndarray, Points], np.ndarray],
    extra: dict[str, tuple[str, tuple[float, float], float]],
    untold: Callable[[Points], str],
    text: str,
    exponents: tuple[str, ...] = (),
) -> Form:
    """A form with Chinchilla's parameters and the ``extra`` ones: name -> (kind, bounds, start)."""
    begin = np.array([start for _, _, start in extra.values()])
    return replace(
        CHINCHILLA,
        name=name,
        names=(*_BASE, *extra),
        kinds=(*CHINCHILLA.kinds, *(kind for kind, _, _ in extra.values())),
        bounds=(*_BASE_BOUNDS, *(bounds for _, bounds, _ in extra.values())),
        exponents=("a", "b", *exponents),
        predict=predict,
        starts=lambda points, loss: [np.append(p, begin) for p in _linear_starts(points.n, points.d, loss)],
        untold=untold,
        text=text,
    )


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        CHINCHILLA,
        _extended(
            "effective",
            _effective,
            {"w": ("share", (3e-4, 1 - 3e-4), 0.4)},
            _needs_sparsities,
            "{e:.4f} + {big_a:.4f} / N^{a:.3f} + {big_b:.4f} / D^{b:.3f}, N = N_active^(1 - {w:.3f}) N_total^{w:.3f}",
            ("w",),
        ),
        _extended(
            "clark",
            _clark,
            {"c": ("free", (-1.0, 2.0), 0.1), "m": ("free", (-0.3, 0.3), 0.0)},
            _needs_sparsities,
            "{e:.4f} + {big_a:.4f} / (N_active^({a:.3f} + {m:.3f} ln x) x^{c:.3f}) + {big_b:.4f} / D^{b:.3f}, "
            "x = N_total / N_active",
            ("c",),
        ),
        _extended(
            "abnar",
            _abnar,
            {
                "big_c": ("positive", (1e-6, 1e2), 0.01),
                "l": ("free", (-2.0, 2.0), 0.3),
                "big_f": ("positive", (1e-6, 1e2), 0.01),
                "m": ("free", (-2.0, 2.0), 0.3),
                "f": ("positive", _EXPONENT, 0.2),
            },
            lambda points: "" if _distinct(points.sparsity) > 3 else "fewer than 4 sparsities",
            "{e:.4f} + {big_a:.4f} / N_total^{a:.3f} + {big_b:.4f} / D^{b:.3f} + {big_c:.4f} x^{l:.3f} "
            "+ {big_f:.4f} x^{m:.3f} / N_total^{f:.3f}, x = N_total / N_active",
        ),
        _extended(
            "krajewski",
            _krajewski,
            {"big_f": ("positive", (1e-6, 1e3), 0.1), "f": ("positive", _EXPONENT, 0.5)},
            lambda points: "" if _distinct(points.granularity) > 2 else "fewer than 3 granularities",
            "{e:.4f} + ({big_a:.4f} + {big_f:.4f} / G^{f:.3f}) / N_active^{a:.3f} + {big_b:.4f} / D^{b:.3f}",
            ("f",),
        ),
        _extended(
            "data_constrained",
            _data_constrained,
            {
                "r_d": ("positive", (0.5, 500.0), REPEATED_DATA),
                "r_n": ("positive", (0.5, 500.0), EXCESS_PARAMETERS),
            },
            lambda points: "" if (points.tokens > 1.5 * points.unique_tokens).sum() >= 3 else "data is not repeated",
            "{e:.4f} + {big_a:.4f} / N'^{a:.3f} + {big_b:.4f} / D'^{b:.3f}, N' and D' saturating with {r_n:.1f} and "
            "{r_d:.1f} repetitions",
        ),
        Form(
            name="farseer",
            names=("p", "q", "g", "r", "s", "t", "v", "k", "h"),
            kinds=("positive", "free", "positive", "free", "free", "free", "free", "free", "free"),
            # Narrow bounds for exponents: if the runs do not determine them, wide ones bend the law just beyond the runs.
            bounds=((1e-4, 20), (-20, 5), (0.02, 2), (-5, 5), (-20, 20), (-5, 5), (-5, 2), (-0.5, 0.5), (-0.5, 0.5)),
            exponents=("g", "h", "k"),
            predict=_farseer,
            starts=_farseer_starts,
            untold=_farseer_untold,
            text="exp({p:.3f} N_active^-{g:.3f} + {q:.3f}) + exp({r:.3f} N_active^{h:.3f} + {s:.3f}) "
            "/ D^exp({t:.3f} N_active^{k:.3f} + {v:.3f})",
        ),
    )
}
