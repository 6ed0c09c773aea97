"""Reads the rows of a CSV or JSONL file with their line numbers. Refuses files that would be misread."""

import csv
import difflib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling_laws.counted import counted
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
# Columns that a table may lack, with other names. Were one overlooked, an MoE would be read as a dense model, or a run that
# blew up as a finished one.
OTHER_OPTIONAL = {
    "n_active": (
        *("n_activated", "n_act", "activated", "active_params", "activated_params", "active_parameters"),
        *("activated_parameters", "num_active_params", "params_active"),
    ),
    "diverged": ("diverge", "divergent", "blew_up", "is_diverged"),
    "unique_tokens": ("distinct_tokens",),
    "n_convention": ("convention",),
    "num_experts": ("experts", "n_experts"),
    "top_k": ("topk", "num_experts_per_tok"),
    "granularity": (),
    "shared_hidden": (),
    "warmup_tokens": (),
    "vocab_size": ("vocab", "vocabulary", "vocabulary_size", "n_vocab"),
}
_OTHER_UNITS = {
    "bits": ("bits_per_token", "bpt", "loss_bits", "bits_per_byte", "bpb"),
    "perplexities": ("ppl", "perplexity", "val_ppl", "test_ppl"),
}


def plain(name: str) -> str:
    """A column's name in small letters, with an underscore for each gap, and without a unit in parentheses."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"[(\[].*", "", name.lower())).strip("_")


def refuse_overlooked(path: Path, columns: set[str]) -> None:
    """Raises InputError if a column that is not read has nearly the name of one that the fit would use."""
    absent = {name: others for name, others in OTHER_OPTIONAL.items() if name not in columns}
    for column in sorted(columns - set(OTHER_OPTIONAL) - set(OTHER_NAMES)):
        name = plain(column)
        same = [known for known, others in absent.items() if name in (known, *others)]
        for known in same or difflib.get_close_matches(name, absent, n=1, cutoff=0.85):
            raise InputError(f"{path}: the column {column!r} is not read: rename it to {known}, or remove it")


def hint_of_names(missing: Sequence[str], columns: Iterable[str]) -> str:
    """The end of a message that says which ``columns`` are probably ``missing`` ones by another name; empty if none are."""
    by_lower = {plain(column): column for column in columns}
    found = [
        f"{by_lower[other]!r} to {name}"
        for name in missing
        for other in (name, *map(plain, OTHER_NAMES.get(name, ())))
        if other in by_lower
    ]
    told = f"; rename {', '.join(found)}" if found else ""
    tokens = [name for name in _TOKENS_A_STEP if name in by_lower]
    if "batch_size" in missing and tokens:
        told += f"; batch_size is {by_lower[tokens[0]]!r} divided by the sequence length"
    for unit, names in _OTHER_UNITS.items():
        named = [by_lower[name] for name in names if name in by_lower]
        if "loss" in missing and named:
            told += (
                f"; {named[0]!r} is in {unit}, and loss in nats per token: bits per token times 0.6931, bits per byte "
                "times 0.6931 and the bytes of a token, or the logarithm of a perplexity"
            )
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
    except IsADirectoryError:
        raise InputError(
            f"{path} is a folder, expected a CSV or JSONL table of runs; from a folder of recipes that were run, "
            f"`qwen-moe scaling collect {shlex.quote(str(path))} --output runs.csv` makes one"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save the table as CSV UTF-8, in pandas by "
            "to_csv('runs.csv', index=False)"
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
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        except (ValueError, RecursionError):  # of Python's own limits
            raise InputError(
                f"{path}:{number}: not a row of a table: a number has thousands of digits, or lists are nested too deeply"
            ) from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}:{number}: a row must be an object of column: value, with a line for each (in pandas: "
                "to_json(PATH, orient='records', lines=True))"
            )
        yield number, record


def _check_header(path: Path, header: list[str]) -> None:
    """Raises InputError for a first line that does not name columns, once each, between commas."""
    first = header[0] if header else ""
    if first.startswith(("{", "[")):
        raise InputError(
            f"{path} is JSON, expected CSV or JSONL: write one object per line into a file that ends in .jsonl (in pandas: "
            "to_json(PATH, orient='records', lines=True))"
        )
    if first.startswith("#"):
        raise InputError(
            f"{path}: its first line begins with #, expected the names of the columns: remove the # or the line"
        )
    if len(header) == 1:
        for separator, told in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (None, "spaces")):
            if len(first.split(separator)) > 2:
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


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines)
    filled = (cells for cells in reader if any(cell.strip() for cell in cells))
    header = [name.strip() for name in next(filled, [])]
    _check_header(path, header)
    for cells in filled:
        if len(cells) != len(header):
            raise InputError(
                f"{path}:{reader.line_num}: the row has {counted(len(cells), 'cell')} and the header "
                f"{counted(len(header), 'column')}: a comma "
                "inside a number or a text needs quotes around it"
            )
        yield reader.line_num, dict(zip(header, cells, strict=True))
