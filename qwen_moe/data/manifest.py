"""`PREFIX.json`: what lies behind a prefix, and the names of the files that belong to one."""

import dataclasses
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json
from qwen_moe.errors import UserError

_ENDINGS = (".bin", ".idx", ".json")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What lies behind a prefix: the content of `PREFIX.json`. What has a default is not in files of older versions.

    ``request`` is a hash of what was asked for by the inputs' paths, sizes and times of change; ``content`` of the same
    by the inputs' content; ``settings`` of the same without the inputs. ``tokenizer_identity`` is a hash of what decides
    a tokenizer's tokens. ``bin_sample_sha256`` is of pieces spread over the file (`content.sample_sha256`) and
    ``bin_mtime_ns`` its time of change when it was hashed as a whole. ``left_out`` counts files and documents that were
    not read.
    """

    documents: int
    tokens: int
    text_bytes: int
    max_token_id: int
    end_of_document_id: int
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    skipped: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str
    request: str
    content: str = ""
    settings: str = ""
    tokenizer_identity: str = ""
    bin_sample_sha256: str = ""
    bin_mtime_ns: int = 0
    files: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def partial_path(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(path.name + ".partial")


def trained_tokenizer_path(prefix: Path) -> Path:
    """Where a tokenizer trained with the data lies."""
    return prefix.with_name(prefix.name + "-tokenizer")


def check_prefix_name(prefix: Path, what: str = "--output") -> None:
    """Raises UserError for a name that cannot be the beginning of file names."""
    if not prefix.name or prefix.name == "..":
        raise UserError(f"{what} {str(prefix)!r} is not a prefix of file names: give one such as data/web")
    if prefix.suffix in _ENDINGS:
        raise UserError(
            f"{what} {prefix} ends in {prefix.suffix}: give the prefix without it, {prefix.with_suffix('')}"
        )
    if len(os.fsencode(prefix.name)) > 200:
        raise UserError(
            f"{what}: {prefix.name[:40]}... is too long for the beginning of file names; use at most 200 bytes"
        )


def was_interrupted(prefix: Path) -> bool:
    """True when files were being put in place: they may be of different preparations."""
    return partial_path(manifest_path(prefix)).is_file() and not manifest_path(prefix).is_file()


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, prepared: PreparedData) -> None:
    """Write ``prepared`` to ``path`` and to the disk."""
    values = asdict(prepared)
    write_json(path, values | {"checksum": _checksum(values)})


def read_manifest(prefix: Path) -> PreparedData | None:
    """The manifest beside a prefix, or None where there is none (data made by other tools). Raises UserError for a
    manifest that is damaged."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it is of type {type(values).__name__}")
        checksum = values.pop("checksum", None)
        if checksum is not None and checksum != _checksum(values):
            raise ValueError("its content does not fit its checksum")
        prepared = PreparedData(**values)
        for entry in dataclasses.fields(prepared):
            value = getattr(prepared, entry.name)
            wanted = entry.type if entry.type in (int, str) else dict
            if type(value) is not wanted or (isinstance(value, int) and value < 0):
                raise ValueError(f"{entry.name} is {str(value)[:40]!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a manifest of prepared data ({error}): prepare the data again, with `qwen-moe data prepare "
            "... --overwrite`"
        ) from None
    return prepared
