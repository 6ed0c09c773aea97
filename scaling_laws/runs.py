"""Reads tables of runs, CSV or JSONL, into one typed schema, and reports every bad row with its line."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling_laws.counted import counted
from scaling_laws.early import without_early
from scaling_laws.errors import InputError
from scaling_laws.table_file import OTHER_NAMES, hint_of_names, plain, read_rows, refuse_overlooked

POSITIVE = ("n_total", "n_active", "tokens", "seq_len", "learning_rate", "batch_size", "loss")
HYPERPARAMETERS = ("learning_rate", "batch_size", "seq_len")
OPTIONAL_POSITIVE = (
    "num_experts",
    "top_k",
    "granularity",
    "unique_tokens",
    "min_learning_rate",
    "beta2",
    "loss_stderr",
    "gpu_hours",
    "training_flops",
    "vocab_size",
)
OPTIONAL_NUMBERS = ("shared_hidden", "weight_decay", "warmup_tokens", "seed")
OPTIONAL_TEXT = ("schedule", "n_convention")
CONVENTIONS = ("non_vocabulary", "with_vocabulary")
GROUP = ("n_total", "n_active", "tokens", "num_experts", "top_k", "granularity", "shared_hidden", "unique_tokens")
# (least, most) of a run: beyond, a mistyped number would bend the fit, or end it. Units are checked apart.
LIMITS = {
    "n_total": (0.0, 1e18),
    "n_active": (0.0, 1e18),
    "tokens": (0.0, 1e18),
    "seq_len": (0.0, 2.0**31 - 1),
    "learning_rate": (1e-12, 1e3),
    "batch_size": (1e-3, 1e12),
    "loss": (2e-3, 1e3),
    "num_experts": (1.0, 1e6),
    "top_k": (0.0, 1e6),
    "granularity": (1e-3, 1e6),
    "unique_tokens": (1.0, 1e18),
    "min_learning_rate": (0.0, 1e3),
    "beta2": (0.0, 1.0),
    "loss_stderr": (0.0, 1e3),
    "gpu_hours": (0.0, 1e12),
    "training_flops": (0.0, 1e40),
    "vocab_size": (2.0, 1e9),
    "shared_hidden": (0.0, 1e9),
    "weight_decay": (0.0, 1e6),
    "warmup_tokens": (0.0, 1e18),
    "seed": (0.0, 1e20),
}
TRUE, FALSE = ("1", "true", "yes", "1.0"), ("", "0", "false", "no", "0.0", "none", "nan")
SHOWN = 20  # problems in one message
LEAST_RATIO, MOST_RATIO = 0.01, 1e5  # tokens per activated parameter of the median run; outside, units are mixed up
SURE_RATIO = 1e3  # up to this, parameters and tokens are in the same unit
LEAST_STEPS, FEW_STEPS = 20, 100  # of the median run: with fewer, batch_size is not in sequences, or hardly
MOST_LOSS = 12.0  # nats per token of the median run: guessing among 160,000 tokens gives no more
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
LEAST_GROUPS = 3  # in a table, for a note about how many of their best runs have an extreme setting
RISING = 0.05  # of log loss, from the group of least to that of most compute: more gets a note
MOST_AT_EDGE = 0.5  # share of the groups; more of them are told


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """Checked runs. ``frame`` has the required columns (n_active = n_total if the table has none), `batch_tokens`,
    `diverged` and `group`. A group is the runs of one model and its data (`GROUP`), the unit that is resampled and held
    out."""

    frame: pd.DataFrame
    convention: str
    warnings: list[str] = field(default_factory=list)

    @property
    def has_hyperparameters(self) -> bool:
        return "learning_rate" in self.frame

    @property
    def finished(self) -> pd.DataFrame:
        """Runs that did not diverge."""
        return self.frame[~self.frame["diverged"]]


def _number(value: Any) -> float | None:
    """The number in a cell: None if it is empty, NaN if it is not a number (JSON's booleans are not)."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _wrong(column: str, given: Any, hint: str = "", expected: str = "a positive number") -> str:
    shown = repr(given) if len(repr(given)) <= 60 else repr(given)[:60] + "..."
    if isinstance(given, str) and "," in given:
        without = given.replace(",", "") if re.fullmatch(r"\s*\d{1,3}(,\d{3})+(\.\d*)?\s*", given) else None
        hint = (
            f" (write {without.strip()}, without thousands separators)"
            if without
            else " (a decimal point, not a comma)"
        )
    unit = (
        re.fullmatch(r"\s*(\d+\.?\d*)\s*([kmbgt])[a-z]*\s*", given, re.IGNORECASE) if isinstance(given, str) else None
    )
    if unit:
        hint = f" (write {float(unit[1]) * UNITS[unit[2].lower()]:g}, without a unit)"
    return f"{column} is {shown}, expected {expected}{hint}"


def _truth(value: Any) -> bool | None:
    """Whether a cell says true or false; None if it says neither."""
    text = str(value).strip().lower()
    return True if text in TRUE else False if text in FALSE else None


def _beyond_limits(column: str, value: float, given: Any) -> list[str]:
    """What is wrong with a number that no run has."""
    least, most = LIMITS[column]
    if least <= value <= most:
        return []
    return [_wrong(column, given, expected=f"at most {most:g}" if value > most else f"at least {least:g}")]


def _contradictions(row: dict[str, Any], dense: bool) -> list[str]:
    """What contradicts itself in a row of valid values. ``dense``: it has no n_active."""
    experts, top_k = row.get("num_experts", 1), row.get("top_k", 1)
    if dense and experts > top_k:
        return [
            f"n_active is empty, and num_experts is {experts:g}: give the parameters that one token uses (empty is for "
            "dense models)"
        ]
    if row["n_active"] > row["n_total"]:
        return [f"n_active {row['n_active']:g} is larger than n_total {row['n_total']:g}"]
    if "top_k" in row and "num_experts" in row and top_k > experts:
        return [f"top_k {top_k:g} is larger than num_experts {experts:g}"]
    if "top_k" in row and experts > top_k and row["n_active"] == row["n_total"]:
        return [
            f"n_active is n_total, {row['n_total']:g}, and num_experts {experts:g} is larger than top_k {top_k:g}: give the "
            "parameters that one token uses as n_active"
        ]
    return []


def _row(record: dict[str, Any], hyperparameters: bool) -> tuple[dict[str, Any], list[str]]:
    """(typed values of a row, its problems)."""
    diverged = _truth(record.get("diverged"))
    row: dict[str, Any] = {"diverged": bool(diverged)}
    problems = [] if diverged is not None else [_wrong("diverged", record["diverged"], expected="true or false")]
    for column in POSITIVE:
        if column in HYPERPARAMETERS and not hyperparameters:
            continue
        value = _number(record.get(column))
        if column == "n_active" and value is None:
            row[column] = row["n_total"]  # a dense model; problems of n_total are already listed
            continue
        if column == "loss" and row["diverged"]:
            row[column] = math.nan
            continue
        hint = " (set diverged to true for a run that blew up)" if column == "loss" else ""
        if value is None:
            problems.append(f"{column} is empty{hint}")
        elif not math.isfinite(value) or value <= 0:
            problems.append(_wrong(column, record[column], hint))
        else:
            problems += _beyond_limits(column, value, record[column])
        row[column] = value
    for column in (*OPTIONAL_POSITIVE, *OPTIONAL_NUMBERS):
        value = _number(record.get(column))
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and column in OPTIONAL_POSITIVE):
            expected = "a positive number" if column in OPTIONAL_POSITIVE else "0 or more"
            problems.append(_wrong(column, record[column], " (leave it empty where it does not apply)", expected))
        else:
            problems += _beyond_limits(column, value, record[column])
        row[column] = value
    for column in OPTIONAL_TEXT:
        if record.get(column):
            row[column] = str(record[column]).strip()
    if not problems:
        problems += _contradictions(row, dense=_number(record.get("n_active")) is None)
    return row, problems


def read_runs(paths: Sequence[Path]) -> RunTable:
    """Read and check tables of runs. Raises InputError that lists every bad row by file and line."""
    rows, problems = [], []
    for path in paths:
        records = list(read_rows(path))
        if not records:
            raise InputError(f"{path} has no rows")
        columns = {key for _, record in records for key in record}
        known = {*POSITIVE, *OPTIONAL_POSITIVE, *OPTIONAL_NUMBERS, *OPTIONAL_TEXT, "diverged"}
        named = {other for name in ("learning_rate", "batch_size") for other in (name, *OTHER_NAMES[name])}
        hyperparameters = not named.isdisjoint(plain(column) for column in columns)
        needed = [c for c in POSITIVE if c != "n_active" and (hyperparameters or c not in HYPERPARAMETERS)]
        missing = [column for column in needed if column not in columns]
        if missing:
            raise InputError(
                f"{path} has no column {', '.join(missing)}: expected {', '.join(needed)} (and n_active for MoE); it has "
                f"{', '.join(sorted(columns & known)) or 'none of these'}{hint_of_names(missing, columns - known)}"
            )
        refuse_overlooked(path, columns)
        for line, record in records:
            row, found = _row(record, hyperparameters)
            problems += [f"{path}:{line}: {problem}" for problem in found]
            rows.append(row | {"source": f"{path}:{line}"})
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError("; ".join(problems[:SHOWN]) + more)
    return _table(pd.DataFrame(rows))


def _table(frame: pd.DataFrame) -> RunTable:
    warnings = []
    given = set(frame["n_convention"].fillna("non_vocabulary")) if "n_convention" in frame else {"non_vocabulary"}
    unknown = given - set(CONVENTIONS)
    if unknown or len(given) > 1:
        raise InputError(
            f"n_convention is {', '.join(sorted(given))}: all rows must state the same one of {', '.join(CONVENTIONS)} "
            "(parameters without or with embedding and head); rows without it count as non_vocabulary"
        )
    if "vocab_size" in frame and frame["vocab_size"].nunique() > 1:
        sizes = frame.dropna(subset="vocab_size").groupby("vocab_size")["source"].first()
        told = ", ".join(f"{size:,.0f} ({source})" for size, source in sizes.items())
        raise InputError(f"losses with different vocabularies cannot be compared: vocab_size is {told}; fit each apart")
    if "vocab_size" in frame and (unknown_sizes := int(frame["vocab_size"].isna().sum())):
        warnings.append(
            f"{unknown_sizes} of {counted(len(frame), 'row')} {'has' if unknown_sizes == 1 else 'have'} no vocab_size: "
            "their losses can be compared only if their vocabulary is that of the others"
        )
    if "learning_rate" in frame and frame["learning_rate"].isna().any():
        raise InputError("tables with and without learning_rate and batch_size cannot be mixed: fit them apart")
    keys = [c for c in ("n_total", "n_active", "tokens", *HYPERPARAMETERS, "seed", "loss") if c in frame]
    twice = frame.duplicated(keys) & ~frame["diverged"]
    if twice.any():
        sources = ", ".join(frame.loc[twice, "source"].head(5)) + (" ..." if twice.sum() > 5 else "")
        warnings.append(
            f"{counted(int(twice.sum()), 'row repeats', 'rows repeat')} another row in every setting and "
            f"{'is' if twice.sum() == 1 else 'are'} left out ({sources})"
        )
        frame = frame[~twice]
    if frame["diverged"].all():
        raise InputError("every run diverged: there is no loss to fit; add runs at lower learning rates")
    warnings += _check_units(frame)
    frame = frame.reset_index(drop=True)
    if "learning_rate" in frame:
        frame["batch_tokens"] = frame["batch_size"] * frame["seq_len"]
        warnings += _check_steps(frame) + _lengths(frame)
        frame, early = without_early(frame)
        frame = frame.reset_index(drop=True)
        warnings += early
    frame["group"] = frame.groupby([column for column in GROUP if column in frame], dropna=False).ngroup()
    warnings += _rising(frame)
    if "learning_rate" in frame:
        warnings += _at_edges(frame)
    return RunTable(frame=frame, convention=given.pop(), warnings=warnings)


def _check_units(frame: pd.DataFrame) -> list[str]:
    """Warnings about medians that are suspiciously small. Raises InputError for medians that no run can have.

    A table with batch sizes has its tokens checked by `_check_steps`: if they were in millions, a step would be longer than
    its run. Then a small n_total is suspicious only if there are many tokens per parameter."""
    warnings = []
    ratio = (frame["tokens"] / frame["n_active"]).median()
    sure = {"n_total", "tokens"} if ratio <= SURE_RATIO else {"tokens"}
    sure = sure if "batch_size" in frame else set()
    for column, never, seldom, unit in (("n_total", 1e3, 1e5, "parameters"), ("tokens", 1e4, 1e6, "tokens")):
        median = frame[column].median()
        told = f"the median of {column} is {median:g}: is it in millions or billions? It counts {unit}"
        if median < never:
            raise InputError(f"{told}: multiply the column by 1e6 or 1e9")
        if median < seldom and column not in sure:
            warnings.append(told)
    if not LEAST_RATIO <= ratio <= MOST_RATIO:
        raise InputError(
            f"the median run has {ratio:.3g} tokens per activated parameter, which is impossible: is one of n_total, "
            "n_active and tokens in millions or billions? They count parameters and tokens"
        )
    if (loss := frame["loss"].median()) > MOST_LOSS:
        warnings.append(
            f"the median of loss is {loss:g}, and guessing among 160,000 tokens gives {MOST_LOSS:g}: is it a perplexity or "
            "a percentage? It counts nats per token"
        )
    return warnings


def _lengths(frame: pd.DataFrame) -> list[str]:
    """A note if sequence lengths differ, on which losses depend."""
    lengths = sorted(frame.loc[~frame["diverged"], "seq_len"].unique())
    if len(lengths) < 2:
        return []
    return [
        f"seq_len is {', '.join(f'{length:g}' for length in lengths[:5])}: longer sequences lower the loss by themselves, "
        "which the fit takes for an effect of the other settings; fit each length apart, unless the losses are of equal "
        "sequences"
    ]


def _rising(frame: pd.DataFrame) -> list[str]:
    """A note if the best runs of groups with more compute end with larger losses."""
    groups = frame[~frame["diverged"]].groupby("group").agg({"n_active": "first", "tokens": "first", "loss": "min"})
    if len(groups) < LEAST_GROUPS or groups["loss"].nunique() < 2:
        return []
    compute, loss = np.log(groups["n_active"]) + np.log(groups["tokens"]), np.log(groups["loss"])
    if compute.nunique() < 2 or np.polyfit(compute, loss, 1)[0] * np.ptp(compute) < RISING:
        return []
    return [
        "losses rise with compute (6 N_active D), where they should fall: is loss the right column, and are all runs of the "
        "same data? A law of the loss that is fitted to them predicts nothing"
    ]


def _at_edges(frame: pd.DataFrame) -> list[str]:
    """Notes if the best runs of most groups have the smallest or the largest value that was tried: then the optimum lies
    beyond the runs, and what is fitted there is extrapolated."""
    notes = []
    finished = frame[~frame["diverged"]]
    for column, told in (("learning_rate", "learning rate"), ("batch_tokens", "batch size")):
        groups = finished.groupby("group")
        groups = finished[groups[column].transform("nunique") >= 3].groupby("group")
        if groups.ngroups < LEAST_GROUPS:
            continue
        members = finished[finished["group"].isin(list(groups.groups))]
        best = members[members["loss"] == members.groupby("group")["loss"].transform("min")]
        for edge, limit, side in (
            ("smallest", groups[column].min(), "smaller"),
            ("largest", groups[column].max(), "larger"),
        ):
            at = best[column] == best["group"].map(limit)  # runs that end alike say only together where the best is
            count = int(at.groupby(best["group"]).all().sum())
            if count > MOST_AT_EDGE * groups.ngroups:
                notes.append(
                    f"in {count} of {counted(groups.ngroups, 'group')} the best run has the {edge} {told} that was "
                    "tried: the optimum "
                    f"is extrapolated there, and is less certain than is said; add runs with {side} ones"
                )
    return notes


def _check_steps(frame: pd.DataFrame) -> list[str]:
    """Raises InputError if a step is longer than its run or runs have few steps: batch_size is then in tokens. Returns a
    note if they may be."""
    steps = frame["tokens"] / frame["batch_tokens"]
    worst = frame.loc[steps.idxmin()]
    told = (
        f"{worst['source']}: one step of batch_size {counted(worst['batch_size'], 'sequence')} x seq_len "
        f"{worst['seq_len']:g} = "
        f"{worst['batch_tokens']:.3g} tokens"
    )
    fix = "batch_size counts sequences: where it is in tokens, divide it by seq_len"
    if steps.min() < 1:
        rows = f" (and {counted(int((steps < 1).sum()) - 1, 'more row')})" if (steps < 1).sum() > 1 else ""
        raise InputError(f"{told} is more than the whole run of {worst['tokens']:.3g} tokens{rows}; {fix}")
    if steps.median() < LEAST_STEPS:
        raise InputError(
            f"half of the runs have fewer than {steps.median():.3g} steps, too few to be runs ({told}, of a run of "
            f"{worst['tokens']:.3g}); {fix}"
        )
    if steps.median() < FEW_STEPS:
        return [f"half of the runs have fewer than {steps.median():.3g} steps, as if batch_size were in tokens; {fix}"]
    return []
