"""Reads the rows of a CSV or JSONL file with their line numbers. Refuses files that would be misread."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling_laws.errors import InputError

# Other common names of our columns. A table that uses one is not read by guess: the error says how to rename it.
OTHER_NAMES = {
    "n_total": ("n", "params", "parameters", "num_params", "model_size"),
    "tokens": ("d", "train_tokens", "data", "dataset_size"),
    "learning_rate": ("lr", "peak_lr", "max_lr"),
    "batch_size": ("bs", "batch", "global_batch_size", "gbs"),
    "seq_len": ("sequence_length", "seq_length", "context_length"),
    "loss": ("final_loss", "train_loss", "smooth loss", "smooth_loss"),
}
_TOKENS_A_STEP = ("batch_tokens", "batch_size_tokens", "tokens_per_step", "batch_size_in_tokens")


def hint_of_names(missing: Sequence[str], columns: set[str]) -> str:
    """The end of a message that says which ``columns`` are probably ``missing`` ones by another name; empty if none are."""
    by_lower = {column.lower(): column for column in columns}
    found = [
        f"{by_lower[other]!r} to {name}"
        for name in missing
        for other in (name, *OTHER_NAMES.get(name, ()))
        if other in by_lower
    ]
    told = f"; rename {', '.join(found)}" if found else ""
    tokens = [name for name in _TOKENS_A_STEP if name in by_lower]
    if "batch_size" in missing and tokens:
        told += f"; batch_size is {by_lower[tokens[0]]!r} divided by the sequence length"
    return told


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, values by column) for each row. A byte order mark, which Excel writes, is skipped.

    Raises InputError for a file that cannot be read, for a repeated column, for separators other than commas, and for rows
    that are longer or shorter than the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _json_rows(path, file) if path.suffix in (".jsonl", ".ndjson") else _csv_rows(path, file)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a CSV or JSONL table of runs") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save the table as CSV UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV table: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{key!r} is given twice")
        found[key] = value
    return found


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error.msg})") from None
        except (InputError, ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: a row must be an object of column: value")
        yield number, record


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines)
    header = [name.strip() for name in next(reader, [])]
    if len(header) == 1:
        for separator, told in ((";", "semicolons"), ("\t", "tabs")):
            if separator in header[0]:
                raise InputError(
                    f"{path}: its columns are separated by {told}, expected commas: save it with commas between columns "
                    "and points in numbers (0.001, not 0,001)"
                )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        places = [str(place) for place, name in enumerate(header, start=1) if name == twice[0]]
        raise InputError(
            f"{path}: the column {', '.join(twice)} is given twice (columns {' and '.join(places)}): remove the wrong one"
        )
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise InputError(
                f"{path}:{reader.line_num}: the row has {len(cells)} cells and the header {len(header)} columns: a comma "
                "inside a number or a text needs quotes around it"
            )
        yield reader.line_num, dict(zip(header, cells, strict=True))
