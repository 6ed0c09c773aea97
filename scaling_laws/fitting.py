"""From a table of runs to everything that a recommendation needs, resampled and held out, as one JSON file."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling_laws.errors import InputError
from scaling_laws.loss_law import FORMS, LossLaw, fit_loss
from scaling_laws.runs import RunTable
from scaling_laws.surface import (
    Surface,
    fit_step_law,
    fit_surface,
    mean,
    nearest_run_excess,
    profiled_minima,
)

FIT = "fit.json"
MINIMA = "groups.csv"
ALIKE = 1.1  # sizes of models that were meant to be alike differ by a few percent (experts, shared experts)
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """``ranges``: [least, most] of what the runs cover. ``*_samples``: refits of resampled groups (cluster bootstrap)."""

    convention: str
    runs: int
    groups: int
    sizes: int
    durations: int  # distinct tokens per parameter
    ranges: dict[str, list[float]]
    surface: Surface | None
    step_law: Surface | None
    surface_samples: list[Surface]
    loss_law: LossLaw | None
    loss_samples: list[LossLaw]
    validation: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write fit.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FIT}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(partial, folder / FIT)


def load_fit(folder: Path) -> Fit:
    """The fit that `qwen-moe scaling fit --output FOLDER` left. Raises InputError."""
    path = folder / FIT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("surface", "step_law"):
            values[key] = Surface(**values[key]) if values[key] else None
        values["surface_samples"] = [Surface(**sample) for sample in values["surface_samples"]]
        values["loss_law"] = LossLaw(**values["loss_law"]) if values["loss_law"] else None
        values["loss_samples"] = [LossLaw(**sample) for sample in values["loss_samples"]]
        return Fit(**values)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: run `qwen-moe scaling fit RUNS.csv --output {folder}` first"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged or of another version ({error}): fit again") from None


def _points(surface: Surface | None, frame: pd.DataFrame) -> pd.DataFrame:
    """What the loss law is fitted to: each group's profiled minimum, or the runs themselves where nothing was tuned."""
    return profiled_minima(surface, frame) if surface is not None else frame[["n_total", "n_active", "tokens", "loss"]]


def _loss(points: pd.DataFrame, form: str, start: LossLaw | None = None) -> LossLaw:
    n_total, n_active, tokens, loss = (points[c].to_numpy(float) for c in ("n_total", "n_active", "tokens", "loss"))
    return fit_loss(n_total, n_active, tokens, loss, form=form, start=start)


def _sparse(frame: pd.DataFrame) -> bool:
    return (frame["n_active"] / frame["n_total"]).round(2).nunique() > 1


def _forms(frame: pd.DataFrame) -> list[str]:
    return list(FORMS) if _sparse(frame) else ["chinchilla"]


def _sizes(frame: pd.DataFrame) -> int:
    """Number of sizes, those within `ALIKE` of the next counting as one."""
    ordered = np.sort(frame["n_total"].unique())
    return int(1 + (np.diff(np.log(ordered)) > np.log(ALIKE)).sum())


def _hold_outs(frame: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """(name, rows held out) of every extrapolation that the table allows."""
    found = []
    if _sizes(frame) > 2:
        largest = frame["n_total"].max()
        found.append((f"largest N ({largest:.3g})", frame["n_total"] > largest / ALIKE))
    compute = frame["n_active"] * frame["tokens"]
    groups = np.sort(compute.groupby(frame["group"]).first().to_numpy())
    if len(groups) >= 5:
        limit = groups[int(0.8 * len(groups))]
        found.append((f"largest compute (6ND from {6 * limit:.3g})", compute >= limit))
    sparsity = (frame["n_active"] / frame["n_total"]).round(2)
    for value in sorted(sparsity.unique()):
        if sparsity.nunique() > 1 and value < 1:
            found.append((f"sparsity {value:.2f}", sparsity == value))
    return found


def _validate(frame: pd.DataFrame, tuned: bool, form: str) -> list[dict[str, Any]]:
    rows = []
    for name, out in _hold_outs(frame):
        inside, outside = frame[~out], frame[out]
        row: dict[str, Any] = {"held_out": name, "groups": int(outside["group"].nunique())}
        try:
            surface = fit_surface(inside) if tuned else None
            if surface is not None:
                row["excess"] = mean(nearest_run_excess(surface, outside).values())
                row["excess_step_law"] = mean(nearest_run_excess(fit_step_law(inside), outside).values())
            law = _loss(_points(surface, inside), form if form in _forms(inside) else "chinchilla")
            points = _points(surface, outside)
            predicted = law.predict(points["n_total"], points["n_active"], points["tokens"])
            row["loss_error"] = float(np.mean(np.abs(predicted / points["loss"].to_numpy() - 1)))
            compute_in, compute_out = (f["n_active"] * f["tokens"] for f in (inside, outside))
            row["compute_ratio"] = float(compute_out.max() / compute_in.max())
        except InputError as error:
            row["not_possible"] = str(error)
        rows.append(row)
    return rows


def _choose_form(frame: pd.DataFrame, surface: Surface | None) -> tuple[str, list[str]]:
    """The form with the least held-out error over every extrapolation, and a note on the others."""
    forms = _forms(frame)
    if len(forms) == 1:
        return forms[0], []
    errors = {}
    for form in forms:
        found = [row["loss_error"] for row in _validate(frame, surface is not None, form) if "loss_error" in row]
        errors[form] = mean(found)
    best = min(errors, key=lambda form: errors[form] if errors[form] == errors[form] else np.inf)
    note = ", ".join(f"{form} {error:.2%}" for form, error in errors.items())
    return best, [f"loss law {best} was chosen by held-out error: {note}"]


def fit_table(table: RunTable, *, samples: int, seed: int, progress: Progress) -> Fit:
    """Fit, choose, hold out and resample. Raises InputError when the table says too little for anything."""
    frame, notes = table.frame, list(table.warnings)
    surface = step_law = None
    if table.has_hyperparameters:
        surface = fit_surface(frame)
        step_law = fit_step_law(frame)
        if surface.held:
            notes.append(
                f"the table cannot tell the effect of {', '.join(surface.held)}: Step Law's published exponent is used there"
                if set(surface.held) != {"sparsity"}
                else "one sparsity only: its effect on learning rate and batch size is taken as none"
            )
    form, why = _choose_form(frame, surface)
    notes += why
    law: LossLaw | None = None
    try:
        law = _loss(_points(surface, frame), form)
    except InputError as error:
        if surface is None:
            raise
        notes.append(f"no loss law: {error}")
    groups = dict(list(frame.groupby("group")))
    rng = np.random.default_rng(seed)
    surfaces: list[Surface] = []
    laws: list[LossLaw] = []
    for _ in progress(range(samples)):
        drawn = rng.choice(list(groups), size=len(groups))
        # A group drawn twice is two groups with free levels of their own.
        resampled = pd.concat([groups[key].assign(group=place) for place, key in enumerate(drawn)], ignore_index=True)
        try:
            again = fit_surface(resampled, start=surface) if surface is not None else None
            points = _points(again, resampled)
            if law is not None:
                laws.append(_loss(points, form, start=law))
            if again is not None:
                surfaces.append(again)
        except InputError:
            continue  # a sample without enough sizes; the share that remains is reported
    if samples and max(len(surfaces), len(laws)) < 0.8 * samples:
        notes.append(
            f"only {max(len(surfaces), len(laws))} of {samples} resamples could be fitted: intervals are optimistic"
        )
    finished = table.finished
    columns = ["n_total", "n_active", "tokens"] + (["learning_rate", "batch_tokens"] if surface is not None else [])
    ranges = {column: [float(finished[column].min()), float(finished[column].max())] for column in columns}
    compute = 6 * finished["n_active"] * finished["tokens"]
    ratio = finished["n_active"] / finished["n_total"]
    ranges |= {
        "compute": [float(compute.min()), float(compute.max())],
        "sparsity": [float(ratio.min()), float(ratio.max())],
    }
    return Fit(
        convention=table.convention,
        runs=len(frame),
        groups=int(frame["group"].nunique()),
        sizes=_sizes(finished),
        durations=int((finished["tokens"] / finished["n_total"]).round(1).nunique()),
        ranges=ranges,
        surface=surface,
        step_law=step_law,
        surface_samples=surfaces,
        loss_law=law,
        loss_samples=laws,
        validation=_validate(frame, surface is not None, form),
        warnings=notes,
    )
