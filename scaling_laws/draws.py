"""Intervals of a fit to few groups of runs: draws of what runs and prior tell, instead of refits to resampled groups.

A resample of 6 groups has 4 different ones on average: too few for the 5 parameters of a loss law, and a law of 5 parameters
through 5 groups has no error that would show. `benchmarks/intervals.py` counts how often either interval holds the truth.

The laws of lr* and B* and the shape are drawn from the Gaussian of `surface_fit.posterior`, in which sizes deviate from the
laws. The loss law is then fitted again to the losses at these optima, each moved by as much as groups deviate from the law,
with another draw of the prior's mean.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from scaling_laws.errors import InputError
from scaling_laws.forms import points_of
from scaling_laws.laboratories import Prior
from scaling_laws.loss_law import LossLaw
from scaling_laws.surface import WINDOW, Surface, group_excess
from scaling_laws.surface_fit import _BOWL, _LAW, Posterior, posterior
from scaling_laws.validation import law_of, minima

FEW_GROUPS = 30


def _surface(known: Posterior, rng: np.random.Generator) -> Surface:
    p = rng.multivariate_normal(known.parameters[:_BOWL], known.covariance[:_BOWL, :_BOWL])
    laws = {"learning_rate": p[:4].tolist(), "batch": p[4:_LAW].tolist(), "shape": p[_LAW:].tolist()}
    return replace(known.surface, **laws)


def _deviation(known: Posterior, finished: pd.DataFrame) -> pd.Series:
    """The standard deviation of each group's log loss at its optimum: of groups from the loss law, and of the runs."""
    near = finished[group_excess(finished) <= WINDOW]
    return np.hypot(known.spread, known.surface.noise / np.sqrt(near.groupby("group").size()))


def draws(
    frame: pd.DataFrame, fitted: tuple[Surface | None, LossLaw | None], prior: Prior, steps: Iterable[int], seed: int
) -> tuple[list[Surface], list[LossLaw]]:
    """For each of ``steps`` a surface and a loss law like the ``fitted`` ones, either of which may be None."""
    surface, law = fitted
    finished = frame[~frame["diverged"]]
    rng, of_prior = (np.random.default_rng([seed, part]) for part in (2, 3))
    known = posterior(frame, prior) if surface is not None else None
    by_group = _deviation(known, finished) if known is not None else None
    surfaces: list[Surface] = []
    laws: list[LossLaw] = []
    best = minima(surface, finished)
    for _ in steps:
        if known is not None:
            surfaces.append(_surface(known, rng))
            best = minima(surfaces[-1], finished)
        if law is None:
            continue
        deviation = (
            by_group[best.index]
            if by_group is not None
            else law.deviation(points_of(best), best["loss"].to_numpy(float))
        )
        moved = best.assign(loss=best["loss"] * np.exp(rng.normal(0, deviation, len(best))))
        try:
            laws.append(law_of(moved, law.form, law, prior.drawn(of_prior)))
        except InputError:
            continue  # a loss below every law's
    return surfaces, laws
