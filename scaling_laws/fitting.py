"""From a table of runs to everything that a recommendation needs, resampled and held out, as one JSON file."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling_laws.errors import InputError
from scaling_laws.forms import FORMS
from scaling_laws.loss_law import LossLaw
from scaling_laws.runs import RunTable
from scaling_laws.surface import Surface, fit_step_law, fit_surface
from scaling_laws.validation import (
    choose_form,
    compute_of,
    count_sizes,
    hold_outs,
    law_of,
    minima,
    over_extrapolation,
    summarise,
)

FIT = "fit.json"
DIGEST = "sha256"  # of the other values
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
    extrapolation: list[dict[str, float]]
    granularity: float  # of the median run, 1 where the table has none
    warnings: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write fit.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FIT}.partial"
        values = asdict(self)
        partial.write_text(json.dumps(values | {DIGEST: _digest(values)}, indent=1), encoding="utf-8")
        os.replace(partial, folder / FIT)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_fit(folder: Path) -> Fit:
    """The fit that `qwen-moe scaling fit --output FOLDER` left. Raises InputError."""
    path = folder / FIT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # One changed digit would be another recommendation.
        if values.pop(DIGEST) != _digest(values):
            raise ValueError("its contents are not those that were written")
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged or of another version ({error}): fit again") from None


def _at_bounds(law: LossLaw) -> list[str]:
    """Parameters that the runs could not tell: they ended where the search ends."""
    form = FORMS[law.form]
    ended = []
    for name, (low, high) in zip(form.names, form.bounds, strict=True):
        value = law.values[name]
        lowest = value < 0.1 if name == "e" else abs(value - low) < 1e-2 * max(abs(low), 1e-3)
        if lowest or abs(value - high) < 1e-2 * abs(high):
            ended.append(f"{name} = {value:.3g}")
    if not ended:
        return []
    return [
        f"the runs cannot tell {', '.join(ended)} of the loss law (at the end of its range): far beyond them its losses are "
        "uncertain; a wider range of N and D would tell"
    ]


def _held_exponents(surface: Surface) -> list[str]:
    """A note on exponents that the table could not tell and that were not fitted, if there are any."""
    if not surface.held:
        return []
    if set(surface.held) == {"sparsity"}:
        return ["one sparsity only: its effect on learning rate and batch size is taken as none"]
    return [
        f"the table cannot tell the effect of {', '.join(surface.held)}: Step Law's published exponent is used there"
    ]


def _resamples(frame: pd.DataFrame, steps: Iterable[int], seed: int) -> Iterator[pd.DataFrame]:
    """For each of ``steps``, as many groups as ``frame`` has, drawn with replacement (cluster bootstrap)."""
    groups = list(frame.groupby("group").indices.values())
    rng = np.random.default_rng(seed)
    for _ in steps:
        drawn = [groups[place] for place in rng.choice(len(groups), size=len(groups))]
        resampled = frame.take(np.concatenate(drawn))
        # A group drawn twice is two groups with free levels of their own.
        yield resampled.assign(group=np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn]))


def _refits(
    resamples: Iterable[pd.DataFrame], surface: Surface | None, law: LossLaw | None, form: str
) -> tuple[list[Surface], list[LossLaw]]:
    """Surface and loss law fitted again to each resample, from where the fits to all runs ended."""
    surfaces: list[Surface] = []
    laws: list[LossLaw] = []
    for resampled in resamples:
        try:
            again = fit_surface(resampled, start=surface) if surface is not None else None
            if law is not None:
                laws.append(law_of(minima(again, resampled[~resampled["diverged"]]), form, start=law))
            if again is not None:
                surfaces.append(again)
        except InputError:
            continue  # a sample without enough sizes; the share that remains is reported
    return surfaces, laws


def _covered(finished: pd.DataFrame, hyperparameters: bool) -> dict[str, list[float]]:
    """[least, most] of what the runs cover."""
    columns = ["n_total", "n_active", "tokens"] + (["learning_rate", "batch_tokens"] if hyperparameters else [])
    values = {column: finished[column] for column in columns}
    values["compute"] = compute_of(finished)
    values["sparsity"] = finished["n_active"] / finished["n_total"]
    return {name: [float(value.min()), float(value.max())] for name, value in values.items()}


def fit_table(table: RunTable, *, samples: int, seed: int, progress: Progress) -> Fit:
    """Fit, choose, hold out and resample. Raises InputError when the table says too little for anything."""
    frame, finished, notes = table.frame, table.finished, list(table.warnings)
    surface = step_law = None
    if table.has_hyperparameters:
        surface = fit_surface(frame)
        step_law = fit_step_law(frame)
        notes += _held_exponents(surface)
    best = minima(surface, finished)
    parts = hold_outs(frame if surface is not None else finished, surface is not None)
    form, why = choose_form(best, parts)
    notes += why
    law: LossLaw | None = None
    try:
        law = law_of(best, form)
        notes += _at_bounds(law)
    except InputError as error:
        if surface is None:
            raise
        notes.append(f"no loss law: {error}")
    surfaces, laws = _refits(_resamples(frame, progress(range(samples)), seed), surface, law, form)
    if samples and max(len(surfaces), len(laws)) < 0.8 * samples:
        notes.append(
            f"only {max(len(surfaces), len(laws))} of {samples} resamples could be fitted: intervals are optimistic"
        )
    return Fit(
        convention=table.convention,
        runs=len(frame),
        groups=int(frame["group"].nunique()),
        sizes=count_sizes(finished),
        durations=int((finished["tokens"] / finished["n_total"]).round(1).nunique()),
        ranges=_covered(finished, surface is not None),
        surface=surface,
        step_law=step_law,
        surface_samples=surfaces,
        loss_law=law,
        loss_samples=laws,
        validation=summarise(parts, form),
        extrapolation=over_extrapolation(finished, form, surface is not None),
        granularity=float(finished["granularity"].median()) if "granularity" in finished else 1.0,
        warnings=notes,
    )
