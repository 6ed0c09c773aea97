"""Rows of Parquet files, and the check that a file has the column with the text."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen_moe.data.sources import Source
from qwen_moe.errors import UserError
from qwen_moe.packages import check_installed

_ROWS = 1024  # that are read together
_NAMED = 20


class NotUtf8(bytes):
    """The bytes of a text that is not UTF-8."""


def check_columns(sources: Iterable[Source], column: str, option: str) -> None:
    """Raise UserError for a Parquet file without text under ``column``, which the user names with ``option``."""
    for source in sources:
        if source.kind == "parquet":
            check_column(source.path, column, option)


def check_column(path: Path, column: str, option: str) -> None:
    """Like `check_columns`, of one file."""
    check_installed(f"{path} is Parquet", "pyarrow", otherwise="convert it to JSONL")
    pa = import_module("pyarrow")
    with _opened(path) as file:
        schema = file.schema_arrow
    _check_names(path, schema)
    if column not in schema.names:
        raise UserError(
            f"{path} has no column {column!r} (found: {', '.join(schema.names[:_NAMED])}): name the column with the text "
            f"with {option}"
        )
    kind = schema.field(column).type
    if not _is_text(pa.types, kind):
        raise UserError(f"{path}: column {column!r} holds {kind}, expected text: name another column with {option}")


def _check_names(path: Path, schema: Any) -> None:
    """Raise UserError for two columns of one name."""
    if twice := [name for number, name in enumerate(schema.names) if name in schema.names[:number]]:
        raise UserError(f"{path} has two columns {twice[0]!r}: rename one of them, or leave it out")


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):  # each text is stored once
        kind = kind.value_type
    known = (types.is_string, types.is_large_string, getattr(types, "is_string_view", types.is_string))
    return any(fits(kind) for fits in known)


def row_count(path: Path) -> int:
    """How many rows a file has. Raises UserError."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, columns) of every row. Text that is not UTF-8 is a `NotUtf8`. Raises UserError for a damaged file."""
    pa = import_module("pyarrow")
    number = 0
    with _opened(path) as file:
        _check_names(path, file.schema_arrow)
        batches = file.iter_batches(batch_size=_ROWS)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{path} is damaged after row {number} ({str(error)[:120]}): fetch it again, or leave it out"
                ) from None
            if batch is None:
                return
            for row in _rows(batch, f"{path}, rows {number + 1:,} to {number + batch.num_rows:,}"):
                number += 1
                yield number, row


def _opened(path: Path) -> Any:
    pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a Parquet file that can be read ({str(error)[:120]}): fetch it again, or leave it out"
        ) from None


def _rows(batch: Any, where: str) -> list[dict[str, Any]]:
    try:
        return list(batch.to_pylist())
    except (
        Exception
    ):  # a text that is not UTF-8, or a value that Python does not have, such as a date after the year 9999
        names = batch.schema.names
        return [
            {name: _value(batch.column(index)[row], name, where) for index, name in enumerate(names)}
            for row in range(batch.num_rows)
        ]


def _value(scalar: Any, name: str, where: str) -> Any:
    """A value; one that Python does not have as text. Raises UserError if it has no text either."""
    pa = import_module("pyarrow")
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return NotUtf8(error.object)
    except Exception as error:
        try:
            return scalar.cast(pa.string()).as_py()
        except pa.ArrowException:
            raise UserError(
                f"{where}: column {name!r} of {scalar.type} has a value that cannot be read ({error!s:.120}): leave the "
                "column out"
            ) from None
