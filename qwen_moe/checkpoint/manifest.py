"""`manifest.json`: the files of a checkpoint with their sizes and SHA-256, and a checksum of the manifest itself.

This is format 2. Format 1 of older checkpoints has no checksum, so each of its values is checked by its form.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from qwen_moe.errors import UserError
from qwen_moe.paths import check_name

MANIFEST = "manifest.json"
METADATA = ".metadata"
MODEL_CONFIG = "model_config.json"
FORMAT_VERSION = 2
_READABLE = (1, FORMAT_VERSION)
_COMPUTE_DTYPES = ("fp64", "fp32", "bf16", "fp16")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP = re.compile(r"step_(\d+)")


class CheckpointDamaged(UserError):
    """A checkpoint that is incomplete or does not match its manifest; the message says what and where."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object in which no name occurs twice. Raises CheckpointDamaged if the file is missing or anything else."""
    try:
        values = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is not readable: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointDamaged(f"{path} is not readable: a JSON object is expected, found {type(values).__name__}")
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _checksum(values: dict[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_text(entries: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """The text of a manifest that lists ``entries`` (file -> size and SHA-256) and contains ``facts`` unchanged."""
    values = {"format": FORMAT_VERSION, **facts, "files": entries}
    return json.dumps(values | {"checksum": _checksum(values)}, indent=1)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint ``path``. Raises CheckpointDamaged if it is missing or damaged."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointDamaged(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    values = read_object(file)
    version = values.get("format")
    if isinstance(version, bool) or version not in _READABLE:
        raise CheckpointDamaged(f"{path} has checkpoint format {version!r}, expected {FORMAT_VERSION}")
    if version == FORMAT_VERSION and values.get("checksum") != _checksum(values):
        raise CheckpointDamaged(f"{file} does not match its own checksum: its content changed")
    try:
        _check_entries(values.get("files"))
        _check_facts(path, values)
    except ValueError as error:
        raise CheckpointDamaged(f"{file} is not readable: {error}") from None
    return values


def _check_entries(entries: Any) -> None:
    if not isinstance(entries, dict):
        raise ValueError("it lists no files")
    for name, entry in entries.items():
        check_name(name)
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"the size of {name!r} is not a number of bytes")
        if not isinstance(entry.get("sha256"), str) or not _SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"the SHA-256 of {name!r} is not valid")
    for name in (METADATA, MODEL_CONFIG):
        if name not in entries:
            raise ValueError(f"it does not list {name}, which every checkpoint has")


def _check_facts(path: Path, values: dict[str, Any]) -> None:
    dtype = values.get("compute_dtype")
    if dtype is not None and dtype not in _COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype is {dtype!r}, expected one of {', '.join(_COMPUTE_DTYPES)}")
    named = _STEP.fullmatch(path.name)
    if named and values.get("step") is not None and values["step"] != int(named[1]):
        raise ValueError(f"it is of step {values['step']!r}, not of the step that the directory is named for")
