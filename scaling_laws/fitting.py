"""Fits everything that a recommendation needs to a table of runs, resamples and holds out, and keeps it as one JSON file."""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling_laws.atomic import write_text
from scaling_laws.counted import counted
from scaling_laws.draws import FEW_GROUPS, draws
from scaling_laws.errors import InputError
from scaling_laws.forms import FORMS
from scaling_laws.laboratories import Prior, laboratory_prior
from scaling_laws.loss_law import LossLaw
from scaling_laws.runs import MOST_AT_EDGE, RunTable, read_runs
from scaling_laws.surface import NOISE, Surface, fit_step_law
from scaling_laws.surface_fit import fit_surface
from scaling_laws.validation import (
    choose_form,
    compute_of,
    count_sizes,
    hold_outs,
    law_of,
    minima,
    over_extrapolation,
    summarize,
)

FIT = "fit.json"
RUNS = "runs.csv"  # the table of the fit
DIGEST = "sha256"  # key of the hash of all other values
DOUBTFUL = 0.02  # excess loss below which a run should not have diverged
LEAST_VALUES = 3  # of learning rate or batch in a group, for a note that its optimum lies beyond them
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Everything that was fitted. ``ranges``: [least, most] of each quantity in the runs. ``*_samples``: refits to
    resampled groups (cluster bootstrap), or, if ``drawn``, draws of what few groups tell (`scaling_laws.draws`)."""

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
    granularity: float  # the runs' median, 1 if the table has none
    laboratories: list[str]  # the prior's
    prior_removed: bool  # then it counts only for what the table does not tell
    table_sha256: str = ""  # of the table as it is kept beside the fit; fits of earlier versions do not say
    warnings: list[str] = field(default_factory=list)
    drawn: bool = False

    @property
    def intervals_of(self) -> str:
        """What the samples are, as text."""
        if self.drawn:
            return "draws of what the runs and the prior tell"
        return "refits to resampled groups, each with another draw of the prior"

    def save(self, folder: Path, table: RunTable) -> None:
        """Write runs.csv and fit.json, each whole or not at all. `read_table` sees if they do not belong together."""
        kept = table.frame.drop(columns=["group"]).to_csv(index=False)
        values = asdict(self) | {"table_sha256": hashlib.sha256(kept.encode()).hexdigest()}
        write_text(folder / RUNS, kept)
        write_text(folder / FIT, json.dumps(values | {DIGEST: _digest(values)}, indent=1))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_fit(folder: Path) -> Fit:
    """The fit that `qwen-moe scaling fit --output FOLDER` wrote. Raises InputError."""
    path = folder / FIT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # A single changed digit would change the recommendation.
        if values.pop(DIGEST) != _digest(values):
            raise ValueError("its contents were changed after it was written")
        for key in ("surface", "step_law"):
            values[key] = Surface(**values[key]) if values[key] else None
        values["surface_samples"] = [Surface(**sample) for sample in values["surface_samples"]]
        values["loss_law"] = LossLaw(**values["loss_law"]) if values["loss_law"] else None
        values["loss_samples"] = [LossLaw(**sample) for sample in values["loss_samples"]]
        return Fit(**values)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: run `qwen-moe scaling fit RUNS.csv --output {shlex.quote(str(folder))}` first"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged or from another version ({error}): fit again") from None


def read_table(fit: Fit, folder: Path) -> RunTable:
    """The table that ``fit``, which ``folder`` holds, was fitted to. Raises InputError."""
    path = folder / RUNS
    table = read_runs([path])
    if fit.table_sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != fit.table_sha256:
        raise InputError(
            f"{path} is not the table that {folder / FIT} was fitted to: `qwen-moe scaling fit` was stopped while it wrote "
            "the two, or one was changed since. Fit again"
        )
    return table


def _at_bounds(law: LossLaw) -> list[str]:
    """A note on parameters that the runs do not determine, because they ended at a bound of the search."""
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
        f"the runs do not determine {', '.join(ended)} of the loss law (at a bound of its range): far beyond the runs its "
        "losses are uncertain; runs over a wider range of N and D would determine it"
    ]


def _expected_exponents(law: LossLaw, prior: Prior) -> list[str]:
    """A note on what a loss law of few groups rests on besides them."""
    if prior.removed or not {"a", "b"} <= set(law.values):
        return []
    a, b = prior.loss
    return [
        f"fewer than {FEW_GROUPS} groups hardly tell the loss law's exponents of N and D: they are expected to be near "
        f"{a:.2f} and {b:.2f}, as in published laws (here {law.values['a']:.2f} and {law.values['b']:.2f}; --no-prior "
        "expects nothing)"
    ]


def _assumed_exponents(surface: Surface) -> list[str]:
    """A note on the exponents that the table does not tell, if there are any."""
    if not surface.held:
        return []
    return [
        f"the table hardly tells the effect of {', '.join(surface.held)} on learning rate or batch size: it is assumed "
        "from what laboratories publish, and is uncertain by how much they differ"
    ]


def _noisy(surface: Surface) -> list[str]:
    """A note if the runs' losses scatter much more than those of other laboratories."""
    if surface.noise < 2 * NOISE:
        return []
    return [
        f"losses scatter by {surface.noise:.2%} around the fit, where {NOISE:.2%} is usual: each run tells less; repeat "
        "the smallest runs with another seed; longer runs, or losses on more validation data, may scatter less"
    ]


def _beyond(surface: Surface, finished: pd.DataFrame, told: list[str]) -> list[str]:
    """Notes if the fitted optima of most groups lie beyond their runs, unless the table's notes have ``told`` so. In crosses
    the best run need not be at an edge for that."""
    notes = []
    optima = surface.optimum(finished["n_total"], finished["n_active"], finished["tokens"])
    for column, what, best in (
        ("learning_rate", "learning rate", optima[0]),
        ("batch_tokens", "batch size", optima[1]),
    ):
        ratio = pd.Series(best / finished[column].to_numpy(float), finished.index).groupby(finished["group"])
        ratio = ratio.filter(lambda values: values.nunique() >= LEAST_VALUES).groupby(finished["group"])
        for count, side in ((int((ratio.min() > 1).sum()), "larger"), (int((ratio.max() < 1).sum()), "smaller")):
            if count > MOST_AT_EDGE * ratio.ngroups and not any(
                f"runs with {side} ones" in t and what in t for t in told
            ):
                notes.append(
                    f"in {count} of {counted(ratio.ngroups, 'group')} the fitted {what} is {side} than any that was "
                    "tried: it is "
                    f"extrapolated there, and is less certain than is said; add runs with {side} ones"
                )
    return notes


def _doubtful(surface: Surface, frame: pd.DataFrame) -> list[str]:
    """A note on diverged runs whose settings are good ones, as far as the others tell."""
    blown = frame[frame["diverged"]]
    place = (blown[c] for c in ("n_total", "n_active", "tokens", "learning_rate", "batch_tokens"))
    doubtful = blown[surface.excess(*place) < DOUBTFUL]
    if doubtful.empty:
        return []
    first = doubtful.iloc[0]
    rate, batch, n = (first[c] for c in ("learning_rate", "batch_tokens", "n_total"))
    where = f"learning rate {rate:.3g}, batch {batch:,.0f} tokens, N {n:.3g}"
    return [
        f"{len(doubtful)} of {counted(len(blown), 'diverged run')} {'has' if len(doubtful) == 1 else 'have'} settings at "
        f"which the others let expect a loss less than {DOUBTFUL:.0%} above the best (first: {where}): they count little; "
        "if they blew up by accident, run them again, "
        "else run their neighbors with another seed"
    ]


def _resamples(frame: pd.DataFrame, steps: Iterable[int], seed: int) -> Iterator[pd.DataFrame]:
    """Cluster bootstrap: for each of ``steps``, as many groups as ``frame`` has, drawn with replacement."""
    groups = list(frame.groupby("group").indices.values())
    rng = np.random.default_rng(seed)
    for _ in steps:
        drawn = [groups[place] for place in rng.choice(len(groups), size=len(groups))]
        resampled = frame.take(np.concatenate(drawn))
        # A group that is drawn twice becomes two groups, each with its own free level.
        yield resampled.assign(group=np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn]))


def _refits(
    resamples: Iterable[pd.DataFrame], surface: Surface | None, law: LossLaw | None, form: str, priors: Iterator[Prior]
) -> tuple[list[Surface], list[LossLaw]]:
    """Fits surface and loss law again to each resample, starting from the fits to all runs. Each takes the next of
    ``priors``. A resample that has too few sizes for the loss law still gives a surface."""
    surfaces: list[Surface] = []
    laws: list[LossLaw] = []
    for resampled in resamples:
        try:
            prior = next(priors)
            again = fit_surface(resampled, surface, prior) if surface is not None else None
            if again is not None:
                surfaces.append(again)
            if law is not None:
                laws.append(law_of(minima(again, resampled[~resampled["diverged"]]), form, law, prior))
        except InputError:
            continue  # `_not_fitted` reports how many were fitted
    return surfaces, laws


def _not_fitted(samples: int, surfaces: int | None, laws: int | None) -> list[str]:
    """A note if many of the ``samples`` could not be fitted. The counts are None without a surface or a loss law."""
    if surfaces is not None and surfaces < 0.8 * samples:
        return [f"only {surfaces} of {samples} resamples could be fitted: intervals are optimistic"]
    if laws is not None and laws < 0.8 * samples:
        return [
            f"the loss law could be fitted to only {laws} of {samples} resamples: the interval of a loss is optimistic"
        ]
    return []


def _covered(finished: pd.DataFrame, hyperparameters: bool) -> dict[str, list[float]]:
    """[least, most] of each quantity in the runs."""
    columns = ["n_total", "n_active", "tokens"] + (["learning_rate", "batch_tokens"] if hyperparameters else [])
    values = {column: finished[column] for column in columns}
    values["compute"] = compute_of(finished)
    values["sparsity"] = finished["n_active"] / finished["n_total"]
    values["tokens_per_parameter"] = finished["tokens"] / finished["n_total"]
    return {name: [float(value.min()), float(value.max())] for name, value in values.items()}


def _drawn(prior: Prior, seed: int) -> Iterator[Prior]:
    """Draws of the prior without end. An exponent that the runs do not tell then varies as laboratories do."""
    rng = np.random.default_rng([seed, 1])
    while True:
        yield prior.drawn(rng)


def fit_table(table: RunTable, *, samples: int, seed: int, progress: Progress, prior: Prior | None = None) -> Fit:
    """Fit, choose the form of the loss, hold out and resample. ``prior``: by default that of all laboratories. Raises
    InputError when the runs are too few for any fit."""
    prior = laboratory_prior() if prior is None else prior
    frame, finished, notes = table.frame, table.finished, list(table.warnings)
    surface = step_law = None
    if table.has_hyperparameters:
        surface = fit_surface(frame, prior=prior)
        step_law = fit_step_law(frame)
        notes += _beyond(surface, finished, notes) + _doubtful(surface, frame)
        notes += _assumed_exponents(surface) + _noisy(surface)
    best = minima(surface, finished)
    parts = hold_outs(frame if surface is not None else finished, surface is not None, prior)
    form, why = choose_form(best, parts)
    notes += why
    law: LossLaw | None = None
    try:
        law = law_of(best, form, prior=prior)
        notes += _at_bounds(law)
    except InputError as error:
        if surface is None:
            raise
        notes.append(f"no loss law: {error}")
    few = frame["group"].nunique() < FEW_GROUPS
    if few:
        notes += _expected_exponents(law, prior) if law is not None else []
        surfaces, laws = draws(frame, (surface, law), prior, progress(range(samples)), seed)
    else:
        resamples = _resamples(frame, progress(range(samples)), seed)
        surfaces, laws = _refits(resamples, surface, law, form, _drawn(prior, seed))
    notes += _not_fitted(
        samples, len(surfaces) if surface is not None else None, len(laws) if law is not None else None
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
        validation=summarize(parts, form),
        extrapolation=over_extrapolation(finished, form, surface is not None, prior),
        granularity=float(finished["granularity"].median()) if "granularity" in finished else 1.0,
        laboratories=list(prior.laboratories),
        prior_removed=prior.removed,
        warnings=notes,
        drawn=few,
    )
