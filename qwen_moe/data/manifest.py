"""`PREFIX.json`, the manifest of prepared data, and the names of the files of a prefix."""

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
LEARN = "learn"  # the column of chat data: uint8, 1 for tokens that are learned
PREFERENCES = "preferences"  # the column of pairs: int8 for each pair and criterion, see PreparedData
KINDS = ("documents", "chat", "pairs")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The content of `PREFIX.json`. Files of older versions lack the fields that have a default.

    Three hashes describe the request: ``request`` with the inputs' paths, sizes and modification times, ``content`` with
    the inputs' content, ``settings`` without the inputs. ``tokenizer_identity`` is a hash of everything that decides a
    tokenizer's tokens. ``bin_sample_sha256`` is a hash of pieces spread over the file (`content.sample_sha256`), and
    ``bin_mtime_ns`` is the file's modification time when it was hashed completely. ``left_out`` counts files and documents
    that were not read.

    ``kind`` is documents (of text), chat (each document is a conversation) or pairs (each two documents are a pair, the
    chosen answer first). ``columns`` are files beside the `.bin` with a value for each of its tokens or documents, by name,
    with their SHA-256. ``counts`` are the figures of chat data, and ``template_sha256`` is a hash of its chat template.
    ``criteria``: by which criteria pairs were judged, and how many by each. Column `PREFERENCES` has a row for each pair and
    a value for each criterion, in the order of their names: 1 if the chosen answer is better, -1 if the rejected one is, 0
    where that was not judged. Pairs without this column were chosen by `preference`.

    ``decontaminated``: the tests that all inputs were checked against (`checked.carried`); empty if some were not.
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
    kind: str = "documents"
    columns: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    template_sha256: str = ""
    criteria: dict[str, int] = field(default_factory=dict)
    decontaminated: dict[str, Any] = field(default_factory=dict)


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def column_path(prefix: Path, name: str) -> Path:
    """The file of a column of data, such as PREFIX.learn.bin."""
    return prefix.with_name(f"{prefix.name}.{name}.bin")


def partial_path(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(path.name + ".partial")


def trained_tokenizer_path(prefix: Path) -> Path:
    """The directory of a tokenizer that was trained with the data."""
    return prefix.with_name(prefix.name + "-tokenizer")


def check_prefix_name(prefix: Path, what: str = "--output") -> None:
    """Raises UserError for a name that cannot be a prefix of file names."""
    if not prefix.name or prefix.name == "..":
        raise UserError(f"{what} {str(prefix)!r} is not a prefix of file names: give one such as data/web")
    if prefix.suffix in _ENDINGS:
        raise UserError(
            f"{what} {prefix} ends in {prefix.suffix}: give the prefix without it, {prefix.with_suffix('')}"
        )
    if prefix.suffix in (f".{LEARN}", f".{PREFERENCES}"):
        raise UserError(f"{what} {prefix} ends in {prefix.suffix}, as a column of chat data does: give another name")
    if len(os.fsencode(prefix.name)) > 200:
        raise UserError(f"{what}: {prefix.name[:40]}... is too long for a prefix of file names; use at most 200 bytes")


def was_interrupted(prefix: Path) -> bool:
    """True if a preparation was interrupted while it replaced files, which may then not belong together."""
    return partial_path(manifest_path(prefix)).is_file() and not manifest_path(prefix).is_file()


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, prepared: PreparedData) -> None:
    """Write ``prepared`` to ``path`` and flush it to disk."""
    values = asdict(prepared)
    write_json(path, values | {"checksum": _checksum(values)})


def read_manifest(prefix: Path) -> PreparedData | None:
    """The manifest of a prefix, or None if there is none (data made by other tools). Raises UserError if it is damaged."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it is of type {type(values).__name__}")
        checksum = values.pop("checksum", None)
        if checksum is not None and checksum != _checksum(values):
            raise ValueError("its content does not match its checksum")
        prepared = PreparedData(**values)
        for entry in dataclasses.fields(prepared):
            value = getattr(prepared, entry.name)
            wanted = entry.type if entry.type in (int, str) else dict
            if type(value) is not wanted or (isinstance(value, int) and value < 0):
                raise ValueError(f"{entry.name} is {str(value)[:40]!r}")
        if prepared.kind not in KINDS or not all(name.isidentifier() for name in prepared.columns):
            raise ValueError(f"kind is {prepared.kind[:40]!r}, with columns {', '.join(prepared.columns)[:40]!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a manifest of prepared data ({error}): prepare the data again, with `qwen-moe data prepare "
            "... --overwrite`"
        ) from None
    return prepared
