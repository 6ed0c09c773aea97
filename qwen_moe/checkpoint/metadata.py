"""Reads `.metadata` of torch.distributed.checkpoint (DCP) without trusting it: nothing that is read is executed.

DCP writes and reads that file with pickle, which runs whatever code the file asks for. This reader accepts only the names
of the few classes of DCP's metadata and reads each object as an inert record. It makes the real metadata from the records
after it has checked every value: types, ranges, that chunks make up their tensor, and that files lie in the checkpoint.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from qwen_moe.checkpoint.manifest import MANIFEST, METADATA, CheckpointDamaged, read_manifest
from qwen_moe.paths import inside

_MODULE = "torch.distributed.checkpoint."
_KNOWN = {
    *((_MODULE + "metadata", kind.__name__) for kind in (BytesStorageMetadata, ChunkStorageMetadata, Metadata)),
    *((_MODULE + "metadata", kind.__name__) for kind in (MetadataIndex, StorageMeta, TensorProperties)),
    (_MODULE + "metadata", "TensorStorageMetadata"),
    (_MODULE + "metadata", "_MEM_FORMAT_ENCODING"),
    (_MODULE + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # The folder that the checkpoint was written to; it is not used.
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Record:
    """One object of the file as inert data: its arguments and its state."""

    kind = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Accepts only the names above and dtypes, and makes a subclass of `_Record` for each name.

    This is Python's own implementation. The one in C is five times as fast, but allocates 64 GB for a memo with a damaged
    index. This one takes about 0.1 s for a thousand stored chunks.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._kinds: dict[tuple[str, str], type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a checkpoint's metadata")
        return self._kinds.setdefault((module, name), type(name, (_Record,), {"kind": name}))


def read_metadata(path: Path) -> Metadata:
    """The metadata of the DCP checkpoint in ``path``. Raises CheckpointDamaged for any other content."""
    file = path / METADATA
    try:
        return _metadata(_Unpickler(file.read_bytes()).load(), path)
    except OSError as error:
        raise CheckpointDamaged(f"{file} cannot be read: {error.strerror or error}") from None
    # The unpickler may raise almost any exception for a file that is not a pickle.
    except Exception as error:
        raise CheckpointDamaged(f"{file} is not the metadata of a checkpoint: {error}") from None


def _state(record: Any, kind: str) -> dict[str, Any]:
    state = record.state if isinstance(record, _Record) and record.kind == kind else None
    if not isinstance(state, dict):
        raise ValueError(f"a {kind} is expected, found {type(record).__name__}")
    return state


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"a size or offset is expected, found {value!r}")
    return value


def _size(record: Any) -> torch.Size:
    if not isinstance(record, _Record) or record.kind != "Size" or len(record.args) != 1:
        raise ValueError(f"a shape is expected, found {type(record).__name__}")
    return torch.Size([_count(value) for value in record.args[0]])


def _tensor(name: str, state: dict[str, Any]) -> TensorStorageMetadata:
    properties = state["properties"]
    values = properties.state if isinstance(properties, _Record) else None
    if properties.kind != "TensorProperties" or not isinstance(values, tuple) or not isinstance(values[0], torch.dtype):
        raise ValueError(f"{name} has no dtype")
    whole = _size(state["size"])
    chunks = []
    for record in state["chunks"]:
        chunk = _state(record, "ChunkStorageMetadata")
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        inside_whole = all(start + size <= total for start, size, total in zip(offsets, sizes, whole, strict=True))
        if len(offsets) != len(whole) or not inside_whole:
            raise ValueError(f"a part of {name} at {tuple(offsets)} does not lie in its shape {tuple(whole)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(whole):
        raise ValueError(f"the parts of {name} do not have as many elements as its shape {tuple(whole)}")
    return TensorStorageMetadata(TensorProperties(dtype=values[0]), whole, chunks)


def _place(record: Any, path: Path, known: dict[str, int]) -> _StorageInfo:
    state = _state(record, "_StorageInfo")
    name, start, length = state["relative_path"], _count(state["offset"]), _count(state["length"])
    if state.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed or encrypted, but our checkpoints never are")
    if name not in known:
        if (path / MANIFEST).is_file() and name not in read_manifest(path)["files"]:
            raise ValueError(f"{name} is not listed in {MANIFEST}")
        known[name] = inside(path, name).stat().st_size
    if start + length > known[name]:
        raise ValueError(f"{name} has {known[name]} bytes, but a tensor is said to end at {start + length}")
    return _StorageInfo(name, start, length)


def _index(record: Any) -> MetadataIndex:
    state = _state(record, "MetadataIndex")
    if not isinstance(state["fqn"], str):
        raise ValueError(f"a name is expected, found {state['fqn']!r}")
    offset = state.get("offset")
    return MetadataIndex(state["fqn"], None if offset is None else _size(offset))


def _metadata(record: Any, path: Path) -> Metadata:
    state = _state(record, "Metadata")
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in state["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise ValueError(f"a name is expected, found {name!r}")
        if isinstance(entry, _Record) and entry.kind == "BytesStorageMetadata":
            entries[name] = BytesStorageMetadata()
        else:
            entries[name] = _tensor(name, _state(entry, "TensorStorageMetadata"))
    known: dict[str, int] = {}
    places = {_index(index): _place(place, path, known) for index, place in state["storage_data"].items()}
    for name, entry in entries.items():
        for chunk in entry.chunks if isinstance(entry, TensorStorageMetadata) else ():
            if MetadataIndex(name, chunk.offsets) not in places:
                raise ValueError(f"a part of {name} at {tuple(chunk.offsets)} lies in no file")
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


class SafeReader(dcp.FileSystemReader):
    """DCP's file reader with checked metadata. It reads tensors by torch.load(weights_only=True)."""

    _read: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._read = self._read or read_metadata(Path(self.path))
        return self._read


class TensorsOnly(DefaultLoadPlanner):
    """DCP's planner, which refuses objects that are not tensors instead of unpickling them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointDamaged(
            f"{read_item.dest_index.fqn} is not a tensor in the checkpoint but another object, so it is not read"
        )
