"""Tests fits on runs that they have not seen, held out by size, compute or sparsity, and chooses the loss's form by that."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from scaling_laws.errors import InputError
from scaling_laws.forms import FORMS, points_of
from scaling_laws.laboratories import Prior, laboratory_prior
from scaling_laws.loss_law import LossLaw, distinct_points, fit_loss
from scaling_laws.surface import ALIKE, NOISE, Surface, _shape, fit_step_law, mean, nearest_run_excess, profiled_minima
from scaling_laws.surface_fit import ROUGH, fit_surface

LEAST_GROUPS = 5  # to fit to when the largest compute is held out
DEPTHS = (0.5, 0.65, 0.8)  # shares of the groups to fit to: a form must also extrapolate far, not only one step
# A form with more parameters must lower a simpler one's held-out error to less than this share of it.
WORTH = 0.95
NEAR = 0.03  # of log loss: runs that place a group's own optimum


def minima(surface: Surface | None, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that the loss law is fitted to: each group's profiled minimum, or the runs themselves without a surface."""
    return profiled_minima(surface, frame) if surface is not None else frame


def law_of(found: pd.DataFrame, form: str, start: LossLaw | None = None, prior: Prior | None = None) -> LossLaw:
    """`fit_loss` for a table's rows. ``prior``: by default that of all laboratories."""
    prior = laboratory_prior() if prior is None else prior
    exponents = None if prior.removed else prior.loss
    return fit_loss(points_of(found), found["loss"].to_numpy(float), form, start, exponents)


def count_sizes(frame: pd.DataFrame) -> int:
    """The number of sizes. Sizes within a factor `ALIKE` of the next count as one."""
    ordered = np.sort(frame["n_total"].unique())
    return int(1 + (np.diff(np.log(ordered)) > np.log(ALIKE)).sum())


def compute_of(frame: pd.DataFrame) -> pd.Series:
    """6 N_active D."""
    return 6 * frame["n_active"] * frame["tokens"]


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Runs that were held out, and how well the others predict them. ``not_possible`` says why if they are too few."""

    name: str
    groups: int
    compute_ratio: float
    inside: pd.DataFrame  # minima
    outside: pd.DataFrame
    excess: float | None = None
    excess_step_law: float | None = None
    not_possible: str = ""
    prior: Prior | None = None

    def loss_error(self, form: str) -> float:
        """Mean relative error of the loss predicted for the held-out runs. Raises InputError."""
        law = law_of(self.inside, form, prior=self.prior)
        return float(np.mean(np.abs(law.at(points_of(self.outside)) / self.outside["loss"].to_numpy() - 1)))


@dataclass(frozen=True, kw_only=True)
class OwnOptima:
    """Where the loss of each group is least: group -> (log learning rate, log batch size), on a surface of ``shape``."""

    shape: np.ndarray
    places: dict[int, np.ndarray]


def own_optima(frame: pd.DataFrame) -> OwnOptima:
    """Fit a surface to the runs of ``frame``, and move it in each group to where its own runs fit best."""
    shape, places = np.array(fit_surface(frame).shape), {}
    for group, runs in frame[~frame["diverged"]].groupby("group"):
        near = runs[runs["loss"] < runs["loss"].min() * np.exp(NEAR)]
        rate, batch, loss = (np.log(near[c].to_numpy(float)) for c in ("learning_rate", "batch_tokens", "loss"))
        deviation = NOISE + ROUGH * (loss - loss.min())
        best = int(loss.argmin())

        def misses(
            p: np.ndarray, rate: Any = rate, batch: Any = batch, loss: Any = loss, deviation: Any = deviation
        ) -> np.ndarray:
            return (loss - p[2] - _shape(shape, rate - p[0], batch - p[1])) / deviation

        places[int(group)] = least_squares(misses, [rate[best], batch[best], loss[best]], loss="soft_l1").x[:2]
    return OwnOptima(shape=shape, places=places)


def own_optimum_excess(surface: Surface, frame: pd.DataFrame, optima: OwnOptima | None = None) -> dict[int, float]:
    """By group: the excess loss of the recommended point over the group's own optimum (`own_optima`). Unlike
    `nearest_run_excess` it does not depend on the grid, and hardly on the seeds."""
    optima, found = own_optima(frame) if optima is None else optima, {}
    for group, runs in frame.groupby("group"):
        first = runs.iloc[0]
        place = np.log(np.array(surface.optimum(first["n_total"], first["n_active"], first["tokens"]))[:, 0])
        u, v = (place - optima.places[int(group)])[:, None]
        found[int(group)] = float(_shape(optima.shape, u, v)[0])
    return found


def hold_out(frame: pd.DataFrame, out: pd.Series, name: str, tuned: bool, prior: Prior | None = None) -> HoldOut:
    inside, outside = frame[~out], frame[out]
    facts: dict[str, Any] = {
        "name": name,
        "groups": int(outside["group"].nunique()),
        "compute_ratio": float(compute_of(outside).max() / compute_of(inside).max()),
        "prior": prior,
    }
    try:
        surface = fit_surface(inside, prior=prior) if tuned else None
        if surface is not None:
            facts["excess"] = mean(nearest_run_excess(surface, outside).values())
            facts["excess_step_law"] = mean(nearest_run_excess(fit_step_law(inside), outside).values())
        return HoldOut(**facts, inside=minima(surface, inside), outside=minima(surface, outside))
    except InputError as error:
        return HoldOut(**facts, inside=inside, outside=outside, not_possible=str(error))


def _parts(frame: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Every extrapolation that the table allows, as (name, mask of the rows to hold out)."""
    if count_sizes(frame) > 2:
        largest = frame["n_total"].max()
        yield f"largest N ({largest:.3g})", frame["n_total"] > largest / ALIKE
    compute = compute_of(frame)
    groups = np.sort(compute.groupby(frame["group"]).first().to_numpy())
    before = None
    for share in DEPTHS:
        place = int(share * len(groups))
        enough = LEAST_GROUPS <= place < len(groups) or (share == DEPTHS[-1] and len(groups) >= LEAST_GROUPS)
        if enough and groups[place] != before:
            before = groups[place]
            yield f"{1 - share:.0%} largest compute (6ND from {groups[place]:.3g})", compute >= groups[place]
    share = frame["n_active"] / frame["n_total"]
    ordered = np.sort(share.unique())
    # Models of one sparsity differ by a few percent.
    for alike in np.split(ordered, np.flatnonzero(np.diff(np.log(ordered)) > np.log(ALIKE)) + 1):
        if len(alike) < len(ordered) and alike[0] < 1:
            yield f"sparsity {np.median(alike):.2f}", share.isin(alike)


def hold_outs(frame: pd.DataFrame, tuned: bool, prior: Prior | None = None) -> list[HoldOut]:
    """The largest size, the largest compute and each sparsity, held out one after the other."""
    parts: dict[bytes, tuple[str, pd.Series]] = {}
    for name, out in _parts(frame):
        # The same runs twice would look like two tests.
        parts.setdefault(out.to_numpy(bool).tobytes(), (name, out))
    return [hold_out(frame, out, name, tuned, prior) for name, out in parts.values()]


def choose_form(frame: pd.DataFrame, parts: list[HoldOut]) -> tuple[str, list[str]]:
    """(the form with the least held-out error, preferring simpler ones by `WORTH`; a note on all forms)."""
    table = points_of(frame)
    forms = [name for name, form in FORMS.items() if not form.untold(table)]
    errors: dict[str, float] = {}
    for form in forms:
        found = []
        for part in parts:
            if part.not_possible:
                continue
            try:
                found.append(part.loss_error(form))
            except InputError:
                continue  # too few runs remain for this form: it is judged by the other hold-outs
        if found and len(found) >= 0.5 * sum(not part.not_possible for part in parts):
            errors[form] = mean(found)
    if not errors:
        simple = [name for name in ("effective", "chinchilla") if name in forms]
        told = [name for name in simple if len(FORMS[name].names) <= distinct_points(table)]
        return (told or simple)[0], []
    best = next(iter(errors))
    for form in sorted(errors, key=lambda name: len(FORMS[name].names)):
        if errors[form] < WORTH * errors[best]:
            best = form
    note = ", ".join(f"{form} {error:.2%}" for form, error in errors.items())
    return best, [f"loss law {best} was chosen by held-out error: {note}"] if len(errors) > 1 else []


def summarize(parts: list[HoldOut], form: str) -> list[dict[str, Any]]:
    """The hold-outs as plain rows, for the fit's file and report."""
    rows = []
    for part in parts:
        row: dict[str, Any] = {"held_out": part.name, "groups": part.groups, "compute_ratio": part.compute_ratio}
        if part.excess is not None:
            row |= {"excess": part.excess, "excess_step_law": part.excess_step_law}
        if part.not_possible:
            row["not_possible"] = part.not_possible
        else:
            try:
                row["loss_error"] = part.loss_error(form)
            except InputError as error:
                row["no_loss_error"] = str(error)
        rows.append(row)
    return rows


def over_extrapolation(
    frame: pd.DataFrame, form: str, tuned: bool, prior: Prior | None = None
) -> list[dict[str, float]]:
    """Fits to the groups below a limit of compute, for a few limits, and tries each larger group. A row has the group's
    compute over the limit's, the error of the predicted loss, and the excess loss of the runs nearest to the
    recommendation and to Step Law's."""
    compute = compute_of(frame)
    groups = np.sort(compute.groupby(frame["group"]).first().to_numpy())
    found = []
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        place = int(share * len(groups))
        if place < LEAST_GROUPS or place >= len(groups):
            continue
        inside, outside = frame[compute < groups[place]], frame[compute >= groups[place]]
        if inside.empty:
            continue
        try:
            surface = fit_surface(inside, prior=prior) if tuned else None
            law = law_of(minima(surface, inside), form, prior=prior)
        except InputError:
            continue
        best = minima(surface, outside)
        ratio = compute_of(best) / compute_of(inside).max()
        errors = np.abs(law.at(points_of(best)) / best["loss"].to_numpy() - 1)
        rows = {
            index: {"ratio": float(ratio[index]), "loss_error": float(error)}
            for index, error in zip(best.index, errors, strict=True)
        }
        if surface is not None:
            for key, by_group in (
                ("excess", nearest_run_excess(surface, outside)),
                ("excess_step_law", nearest_run_excess(fit_step_law(inside), outside)),
            ):
                for group, value in by_group.items():
                    if group in rows:
                        rows[group][key] = value
        found += list(rows.values())
    return found
