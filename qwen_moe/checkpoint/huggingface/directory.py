"""Reads and writes Hugging Face model directories: shards, index and the files beside them."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_moe.checkpoint.finite import check_cast, check_finite
from qwen_moe.checkpoint.huggingface.names import Piece
from qwen_moe.checkpoint.huggingface.safetensors_file import Header, build_header, parse_header, read_header, write_file
from qwen_moe.checkpoint.tensor_store import TensorSource
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError
from qwen_moe.paths import check_name, leads_out

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
_LARGEST_SIDE_FILE = 200_000_000
_WEIGHT_FILES = re.compile(r".*\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pth?|gguf|h5|msgpack|onnx)")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Parse "5GB", "200MiB" or a plain number into bytes. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    known = found is not None and found[2].upper() in _UNITS and len(str(text)) <= 40
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found is not None and known else 0
    if not 0 < size < 2**63:
        raise UserError(
            f"shard size {str(text)[:40]!r} is not a size: give a number of bytes or one with a unit, such as 5GB"
        )
    return size


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is missing or holds something else."""
    return json_object(read_text(path, "file", "a Hugging Face model directory"), str(path))


def _shard_name(name: Any, where: str) -> str:
    """Returns ``name``, read from the file ``where``. Raises UserError unless it is a safetensors file's plain name."""
    try:
        check_name(name)
    except ValueError as error:
        raise UserError(f"{where} names an invalid shard: {error}; download it again") from None
    if "/" in name or not name.endswith(".safetensors"):
        raise UserError(f"{where} names shard {name!r}, expected a .safetensors file beside it: download it again")
    return name


def _other_weights(directory: Path) -> str:
    """What a directory without safetensors files has, and what to do."""
    found = [path.name for path in directory.iterdir() if _WEIGHT_FILES.fullmatch(path.name) and path.is_file()]
    others = sorted(found, key=lambda name: (name.endswith(".json"), name))
    if not others:
        return "no weights: download the whole directory again"
    if others[0].endswith(".json"):
        return f"only the index {others[0]}: download the whole directory again"
    pickled = "which is a pickle: " if others[0].endswith((".bin", ".pt", ".pth")) else "which is of another format: "
    return f"only {others[0]}, {pickled}load it in transformers and save it again with save_pretrained"


def _without_index(present: list[str]) -> str:
    """What is wrong with the safetensors files ``present``, which have no index, and what to do."""
    others = [name for name in present if name != SINGLE]
    adapters = [name for name in others if name.startswith("adapter")]
    if adapters:
        return f"{adapters[0]}, which is an adapter: merge it into its model first (merge_and_unload of peft), or remove it"
    if len(present) == 1:
        return (
            f"only {others[0]}, expected {SINGLE} or several files with {INDEX}: rename it if it holds the whole model"
        )
    if len(others) < len(present):
        return f"{others[0]} beside {SINGLE} and no {INDEX}: remove what does not belong to the model, or download the index"
    return f"{len(present)} .safetensors files but no {INDEX}: download it too"


def open_shards(directory: Path) -> dict[Path, Header]:
    """Headers of all safetensors files of a directory, checked against its index. Raises UserError."""
    present = {path.name for path in directory.glob("*.safetensors")}
    if not present:
        raise UserError(f"{directory} has no .safetensors file, {_other_weights(directory)}")
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{directory / INDEX} has no weight_map: download it again")
        named = {_shard_name(name, str(directory / INDEX)) for name in weight_map.values()}
    elif present == {SINGLE}:
        weight_map, named = None, {SINGLE}
    else:
        raise UserError(f"{directory} has {_without_index(sorted(present))}")
    for name in sorted(named ^ present):
        problem = "is missing" if name in named else "is not listed there, so one of the two is wrong"
        raise UserError(f"shard {name} of {directory / INDEX} {problem}: download the whole directory again")
    headers = {directory / name: read_header(directory / name) for name in sorted(named)}
    places: dict[str, str] = {}
    for path, header in headers.items():
        for tensor in header.entries:
            if tensor in places:
                raise UserError(f"tensor {tensor} is in both {places[tensor]} and {path.name} of {directory}")
            places[tensor] = path.name
    if weight_map is not None:
        for tensor in sorted(places.keys() | weight_map.keys()):
            if places.get(tensor) != weight_map.get(tensor):
                raise UserError(
                    f"{INDEX} places tensor {tensor} in {weight_map.get(tensor, 'no file')}, but "
                    f"{places.get(tensor, 'no file')} of {directory} has it: download the directory again"
                )
    return headers


@dataclass(frozen=True)
class ShardLayout:
    """How a directory's tensors were laid out in files: header texts by file name, and the index's text."""

    headers: dict[str, str]
    index: str | None

    @classmethod
    def of(cls, directory: Path, headers: dict[Path, Header]) -> "ShardLayout":
        index = directory / INDEX
        return cls(
            {path.name: header.text for path, header in headers.items()},
            index.read_text(encoding="utf-8") if index.is_file() else None,
        )

    def dumps(self) -> str:
        return json.dumps({"headers": self.headers, "index": self.index}, indent=1)

    @classmethod
    def read(cls, path: Path) -> "ShardLayout":
        """Read a file that `dumps` wrote. Raises UserError if it holds anything else, or an invalid shard name."""
        values = read_json(path)
        headers, index = values.get("headers"), values.get("index")
        if not isinstance(headers, dict) or not all(isinstance(text, str) for text in headers.values()):
            raise UserError(f"{path} does not say how tensors lie in files: remove the checkpoint and convert it again")
        names = [_shard_name(name, str(path)) for name in headers]
        if len({name.casefold() for name in names}) != len(names) or not isinstance(index, str | None):
            raise UserError(f"{path} does not say how tensors lie in files: remove the checkpoint and convert it again")
        return cls(headers, index)


def _holds(directory: Path) -> Path:
    """The folder that files of ``directory`` may really be in: itself, or the Hugging Face cache if it is a snapshot."""
    whole = directory.resolve()
    return whole.parents[1] if whole.parent.name == "snapshots" and (whole.parents[1] / "blobs").is_dir() else whole


def _unusable_name(relative: Path) -> str:
    """Why a checkpoint's manifest cannot name the file ``relative``, or ""."""
    try:
        check_name(relative.as_posix())
    except ValueError as error:
        return str(error)
    return ""


def side_files(directory: Path) -> tuple[list[Path], list[str]]:
    """Relative paths of files below ``directory`` that are kept with the weights (tokenizer, templates, license), and notes
    on files that are not kept. Hidden folders, such as a download cache, are ignored. Links that lead out of the directory
    are not followed, because whoever made it could otherwise have any of the user's files copied."""
    kept, notes = [], []
    root = _holds(directory)
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts[:-1]):
            continue
        if problem := _unusable_name(relative):
            notes.append(f"{problem} and is not kept: give it another name")
        elif _WEIGHT_FILES.fullmatch(path.name):
            if len(relative.parts) > 1 or not path.name.endswith((".safetensors", ".safetensors.index.json")):
                notes.append(f"{relative} holds weights in another format and is not kept")
        elif leads_out(path, root):
            notes.append(f"{relative} is a link to a file outside {directory} and is not kept: copy the file there")
        elif path.stat().st_size > _LARGEST_SIDE_FILE:
            notes.append(f"{relative} is larger than {_LARGEST_SIDE_FILE // 10**6} MB and is not kept")
        else:
            kept.append(relative)
    return kept, notes


def copy_files(source: Path, names: list[Path], target: Path) -> None:
    """Copy the contents (not links) of ``names`` under ``source`` to the same paths under ``target``."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


@dataclass(frozen=True)
class Shards:
    """Files to write, each with its header, and the index's text (None for a single file)."""

    files: dict[str, Header]
    index: str | None

    @property
    def data_bytes(self) -> int:
        return sum(header.data_bytes for header in self.files.values())


def _index_text(files: dict[str, Header]) -> str:
    entries = {name: (file, entry) for file, header in files.items() for name, entry in header.entries.items()}
    sizes = [(entry.end - entry.start, entry.dtype.itemsize) for _, entry in entries.values()]
    metadata = {
        "total_parameters": sum(size // item for size, item in sizes),
        "total_size": sum(size for size, _ in sizes),
    }
    weight_map = {name: file for name, (file, _) in entries.items()}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def plan_shards(pieces: list[Piece], dtypes: dict[str, torch.dtype], max_shard_bytes: int) -> Shards:
    """Fill files in the model's order up to ``max_shard_bytes``. A larger tensor gets its own file.

    The keys of ``dtypes`` are our parameter names.
    """
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    used = 0
    for piece in pieces:
        dtype = piece.dtype(dtypes)
        size = dtype.itemsize * int(torch.Size(piece.shape).numel())
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append((piece.hf_name, dtype, piece.shape))
        used += size
    if len(groups) == 1:
        return Shards({SINGLE: build_header(groups[0])}, None)
    files = {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": build_header(group)
        for number, group in enumerate(groups, 1)
    }
    return Shards(files, _index_text(files))


def same_shards(layout: ShardLayout, pieces: dict[str, Piece], dtypes: dict[str, torch.dtype]) -> Shards | None:
    """The files of ``layout`` again. If names and dtypes are the same, headers are equal byte for byte; otherwise each file
    holds the same tensors. None if ``layout`` has another set of tensors. ``pieces`` are by Hugging Face name and include
    fused ones and a tied head."""
    files = {}
    verbatim = True
    covered: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, text in layout.headers.items():
        header = parse_header(text, f"the stored header of {name}")
        known = [tensor for tensor in header.entries if tensor in pieces]
        for tensor in known:
            covered[pieces[tensor].parameter].add(pieces[tensor].index)
        wanted = [(tensor, dtypes[pieces[tensor].parameter], pieces[tensor].shape) for tensor in known]
        if wanted != [(tensor, entry.dtype, entry.shape) for tensor, entry in header.entries.items()]:
            header = build_header(wanted, keep_order=True)
            verbatim = False
        files[name] = header
    parts: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for piece in pieces.values():
        if piece.index:
            parts[piece.parameter].add(piece.index)
    for parameter in dtypes:
        if () not in covered[parameter] and not (parts[parameter] and parts[parameter] <= covered[parameter]):
            return None
    verbatim = verbatim and _describes(layout.index, files)
    return Shards(files, layout.index if verbatim or layout.index is None else _index_text(files))


def _describes(index: str | None, files: dict[str, Header]) -> bool:
    """Whether an index lists exactly the tensors of ``files``, each in its file."""
    try:
        found = json.loads(index or "{}").get("weight_map")
    except (ValueError, AttributeError, RecursionError):
        return False
    return found == {name: file for file, header in files.items() for name in header.entries}


class _Recent:
    """Caches the last two stacked tensors, because Hugging Face's files need their parts expert by expert."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._held: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        if name not in self._held:
            while len(self._held) > 1:
                self._held.pop(next(iter(self._held)))
            self._held[name] = self._source.read(name)
        return self._held[name]

    def forget(self) -> None:
        self._held.clear()


def write_shards(
    directory: Path,
    shards: Shards,
    source: TensorSource,
    pieces: dict[str, Piece],
    progress: Callable[[int], Any],
    part: Callable[[Piece, torch.Tensor], torch.Tensor],
) -> None:
    """Write all files into ``directory``. ``progress`` is called with the bytes of every tensor written. ``part`` computes
    the content of a piece that does not hold plain values."""
    recent = _Recent(source)

    def tensors(header: Header) -> Iterator[torch.Tensor]:
        for name, entry in header.entries.items():
            piece = pieces[name]
            if piece.index:
                values = recent.read(piece.parameter)[piece.index]
            else:
                recent.forget()
                values = source.read(piece.parameter)
            check_finite(name, values, "the weights to export")
            if piece.holds == "values":
                yield check_cast(name, values, values.reshape(piece.shape).to(entry.dtype))
            else:
                yield part(piece, values)
            progress(entry.end - entry.start)

    for name, header in shards.files.items():
        write_file(directory / name, header, tensors(header))
    if shards.index is not None:
        (directory / INDEX).write_text(shards.index, encoding="utf-8")
