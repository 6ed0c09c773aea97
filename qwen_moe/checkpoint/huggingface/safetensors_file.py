"""Streams safetensors files: checks headers, and reads and writes tensors one at a time without memory maps.

The format is: 8 bytes of little-endian header length, a JSON header (name -> dtype, shape, data_offsets), the data. The
`safetensors` library maps whole files into memory when reading and needs all tensors at once when writing, but conversion
must hold only one.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qwen_moe.errors import UserError

# In the library's order of dtypes. It writes the tensors of a file in the reverse order, widest dtype first.
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = list(DTYPES.values())
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``start`` and ``end`` are byte offsets from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed header. ``text`` is exactly as on disk; ``entries`` are in the order of their data."""

    text: str
    metadata: dict[str, str] | None
    entries: dict[str, Entry]

    @cached_property
    def data_start(self) -> int:
        """The position in the file where the data begins."""
        return 8 + len(self.text.encode())

    @property
    def data_bytes(self) -> int:
        return max((entry.end for entry in self.entries.values()), default=0)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise ValueError(f"{str(values)[:60]} is not a list of sizes")
    return tuple(values)


def _described(value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, start and end of one tensor in the header."""
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise ValueError("a tensor has no dtype")
    shape, offsets = _whole_numbers(value.get("shape")), _whole_numbers(value.get("data_offsets"))
    if len(offsets) != 2:
        raise ValueError("a tensor has no begin and end")
    return value["dtype"], shape, offsets[0], offsets[1]


def parse_header(text: str, where: str) -> Header:
    """Parse a header. Raises UserError if ``text`` is not a header, has gaps, or names an unsupported dtype."""
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        metadata = values.pop("__metadata__", None)
        if metadata is not None and not isinstance(metadata, dict):
            raise ValueError("__metadata__ is not a JSON object")
        plain = {name: _described(value) for name, value in values.items()}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not a safetensors file (header: {error}): download it again") from None
    entries = {}
    position = 0
    for name, (dtype, shape, start, end) in sorted(plain.items(), key=lambda item: (item[1][2], item[1][3])):
        if dtype not in DTYPES:
            raise UserError(
                f"tensor {name} in {where} has dtype {dtype}, expected one of {', '.join(DTYPES)}: "
                "quantized weights cannot be converted, use the original model"
            )
        if start != position or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"tensor {name} in {where} lies at bytes {start} to {end}, which does not fit its shape")
        entries[name] = Entry(DTYPES[dtype], shape, start, end)
        position = end
    return Header(text, metadata, entries)


def read_header(path: Path) -> Header:
    """Read the header of ``path`` and check it against the length of the file. Raises UserError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise UserError(f"{path} is not a safetensors file, or is truncated ({size} bytes): download it again")
            text = file.read(length).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a safetensors file: its header is not text") from None
    header = parse_header(text, str(path))
    expected = 8 + length + header.data_bytes
    if size != expected:
        raise UserError(f"{path} has {size} bytes, expected {expected}: truncated or damaged, download it again")
    return header


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], keep_order: bool = False) -> Header:
    """The header that the safetensors library would write for these tensors (with transformers' metadata).

    Unless ``keep_order``, tensors are sorted like the library does: by dtype (widest first), then by name.
    """
    tensors = list(tensors)
    if not keep_order:
        tensors.sort(key=lambda item: (-_ORDER.index(item[1]), item[0]))
    metadata = {"format": "pt"}
    values: dict[str, Any] = {"__metadata__": metadata}
    entries = {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = Entry(dtype, shape, position, end)
        values[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    return Header(text + " " * (-len(text.encode()) % 8), metadata, entries)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy().data)


def read_into(file: BinaryIO, header: Header, name: str, out: torch.Tensor) -> None:
    """Read tensor ``name`` into ``out``, a contiguous CPU tensor of the same dtype and number of elements."""
    entry = header.entries[name]
    assert out.is_contiguous() and out.dtype == entry.dtype and out.nbytes == entry.end - entry.start
    view = _bytes_of(out)
    file.seek(header.data_start + entry.start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{file.name} ended while tensor {name} was read: the file has changed, start again")
        done += count


def write_file(path: Path, header: Header, tensors: Iterator[torch.Tensor]) -> None:
    """Write a file and flush it to disk. ``tensors`` are taken one at a time, in the order of ``header.entries``."""
    with path.open("wb") as file:
        text = header.text.encode()
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), tensor in zip(header.entries.items(), tensors, strict=True):
            tensor = tensor.detach().cpu().contiguous()
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, name
            file.write(_bytes_of(tensor))
            del tensor
        file.flush()
        os.fsync(file.fileno())
