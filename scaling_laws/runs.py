"""The table of runs: one typed schema from CSV or JSONL, every bad row reported with its line."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from scaling_laws.errors import InputError

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
)
OPTIONAL_NUMBERS = ("shared_hidden", "weight_decay", "warmup_tokens", "seed")
OPTIONAL_TEXT = ("schedule", "n_convention")
CONVENTIONS = ("non_vocabulary", "with_vocabulary")
GROUP = ("n_total", "n_active", "tokens", "num_experts", "top_k", "granularity", "shared_hidden", "unique_tokens")
SHOWN = 20  # problems in one message


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """Checked runs. ``frame`` has the required columns (n_active = n_total where the table has none), `batch_tokens`,
    `diverged` and `group`: runs of the same model and data (`GROUP`), the unit that is resampled and held out."""

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


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, values) of each row."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix in (".jsonl", ".ndjson"):
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        try:
                            record = json.loads(line)
                        except json.JSONDecodeError as error:
                            raise InputError(f"{path}:{number}: not valid JSON ({error.msg})") from None
                        if not isinstance(record, dict):
                            raise InputError(f"{path}:{number}: a row must be an object of column: value")
                        yield number, record
            else:
                reader = csv.DictReader(file)
                for record in reader:
                    yield reader.line_num, {key: value for key, value in record.items() if key is not None}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a CSV or JSONL table of runs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _number(value: Any) -> float | None:
    """None for an empty cell; NaN for what is no number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _truth(value: Any) -> bool:
    return str(value).strip().lower() in ("1", "true", "yes", "1.0")


def _row(record: dict[str, Any], hyperparameters: bool) -> tuple[dict[str, Any], list[str]]:
    """Typed values of a row and what is wrong with it."""
    row: dict[str, Any] = {"diverged": _truth(record.get("diverged", False))}
    problems = []
    for column in POSITIVE:
        if column in HYPERPARAMETERS and not hyperparameters:
            continue
        value = _number(record.get(column))
        if column == "n_active" and value is None:
            value = _number(record.get("n_total"))
        if column == "loss" and row["diverged"]:
            row[column] = math.nan
            continue
        if value is None:
            problems.append(f"{column} is empty")
        elif not math.isfinite(value) or value <= 0:
            hint = " (set diverged to true for a run that blew up)" if column == "loss" else ""
            problems.append(f"{column} is {record.get(column)!r}, expected a positive number{hint}")
        row[column] = value
    for column in (*OPTIONAL_POSITIVE, *OPTIONAL_NUMBERS):
        value = _number(record.get(column))
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and column in OPTIONAL_POSITIVE):
            problems.append(f"{column} is {record.get(column)!r}, expected a positive number")
        row[column] = value
    for column in OPTIONAL_TEXT:
        if record.get(column):
            row[column] = str(record[column]).strip()
    if not problems and row["n_active"] > row["n_total"]:
        problems.append(f"n_active {row['n_active']:g} is larger than n_total {row['n_total']:g}")
    return row, problems


def read_runs(paths: Sequence[Path]) -> RunTable:
    """Read and check tables of runs. Raises InputError that lists every bad row by file and line."""
    rows, problems = [], []
    for path in paths:
        records = list(_records(path))
        if not records:
            raise InputError(f"{path} has no rows")
        columns = {key for _, record in records for key in record}
        known = {*POSITIVE, *OPTIONAL_POSITIVE, *OPTIONAL_NUMBERS, *OPTIONAL_TEXT, "diverged"}
        hyperparameters = any(column in columns for column in ("learning_rate", "batch_size"))
        needed = [c for c in POSITIVE if c != "n_active" and (hyperparameters or c not in HYPERPARAMETERS)]
        missing = [column for column in needed if column not in columns]
        if missing:
            raise InputError(
                f"{path} has no column {', '.join(missing)}: expected {', '.join(needed)} (and n_active for MoE); it has "
                f"{', '.join(sorted(columns & known)) or 'none of these'}"
            )
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
    if "learning_rate" in frame and frame["learning_rate"].isna().any():
        raise InputError("tables with and without learning_rate and batch_size cannot be mixed: fit them apart")
    keys = [c for c in ("n_total", "n_active", "tokens", *HYPERPARAMETERS, "seed", "loss") if c in frame]
    twice = frame.duplicated(keys) & ~frame["diverged"]
    if twice.any():
        sources = ", ".join(frame.loc[twice, "source"].head(5))
        warnings.append(f"{int(twice.sum())} rows repeat another in every setting and are left out ({sources} ...)")
        frame = frame[~twice]
    if frame["diverged"].all():
        raise InputError("every run diverged: there is no loss to fit; add runs at lower learning rates")
    for column, least, unit in (("n_total", 1e5, "parameters"), ("tokens", 1e6, "tokens")):
        if frame[column].median() < least:
            warnings.append(
                f"the median of {column} is {frame[column].median():g}: is it in millions or billions? It counts {unit}"
            )
    frame = frame.reset_index(drop=True)
    if "learning_rate" in frame:
        frame["batch_tokens"] = frame["batch_size"] * frame["seq_len"]
    frame["group"] = frame.groupby([column for column in GROUP if column in frame], dropna=False).ngroup()
    return RunTable(frame=frame, convention=given.pop(), warnings=warnings)
