"""Checks that a `.bin/.idx` pair is unchanged: its structure, and its content by hashes.

The `.idx` is always hashed completely, and so is a `.bin` of at most `WHOLE_BYTES`. For a larger `.bin`, every start hashes
pieces spread over the file. The whole file is hashed when it is prepared, and again if its size, modification time or inode
differs from then and from the last complete check.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launchers.folder.atomic import write_text
from qwen_moe.data.manifest import PreparedData, bin_path, column_path, idx_path, read_manifest, was_interrupted
from qwen_moe.errors import UserError

WHOLE_BYTES = 1 << 30
_PIECES, _PIECE_BYTES = 1024, 1 << 16
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Content:
    """A checked pair. ``signature`` is equal in every process that sees the same unchanged files. ``columns`` are the
    SHA-256 of the columns that the manifest names."""

    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str
    signature: tuple[int, ...]
    columns: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """A hash of the tokens, of their division into documents, and of the columns."""
        return hashlib.sha256("".join((self.bin_sha256, self.idx_sha256, *self.columns)).encode()).hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def unchanged_sha256(path: Path) -> str:
    """Like `sha256`, but cached in the process while the file's status does not change."""
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _hashed(path: Path, *_status: int) -> str:
    return sha256(path)


def sample_sha256(path: Path) -> str:
    """SHA-256 of 1,024 pieces of 64 KiB at equal distances, from first to last; a small file is hashed completely."""
    size = path.stat().st_size
    if size <= _PIECES * _PIECE_BYTES:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def signature(prefix: Path) -> tuple[int, ...]:
    found: list[int] = []
    manifest = read_manifest(prefix)
    columns = [column_path(prefix, name) for name in manifest.columns] if manifest is not None else []
    for path in (bin_path(prefix), idx_path(prefix), *columns):
        status = path.stat()
        found += [status.st_size, status.st_mtime_ns, status.st_ino]
    return tuple(found)


def _header(prefix: Path) -> tuple[np.ndarray, int, int, int]:
    """(the .idx as bytes, bytes per token, sequences, entries of the document index). Raises UserError if damaged."""
    path = idx_path(prefix)
    for needed in (path, bin_path(prefix)):
        if not needed.is_file():
            raise UserError(
                f"{needed} does not exist: give data prefixes without the suffix, made by `qwen-moe data prepare`"
            )
    content = np.memmap(path, mode="r", dtype=np.uint8) if path.stat().st_size else np.zeros(0, np.uint8)
    header = len(_INDEX_MAGIC) + 8 + 1 + 16
    if content.size < header or content[: len(_INDEX_MAGIC)].tobytes() != _INDEX_MAGIC:
        raise UserError(f"{path} is not a Megatron index file, or is truncated: prepare the data again")
    version = int.from_bytes(content[len(_INDEX_MAGIC) : len(_INDEX_MAGIC) + 8].tobytes(), "little")
    code = int(content[len(_INDEX_MAGIC) + 8])
    sequences, entries = np.frombuffer(content[header - 16 : header].tobytes(), dtype="<u8").tolist()
    if version != 1 or code not in _WIDTHS or content.size != header + 12 * sequences + 8 * entries:
        raise UserError(f"{path} has {content.size} bytes, which contradicts its header: prepare the data again")
    if code in (6, 7):
        raise UserError(f"{path} holds floating-point numbers, expected token ids: prepare the data again")
    return content[header:], _WIDTHS[code], sequences, entries


def token_dtype(prefix: Path) -> np.dtype:
    """The type of the token ids in a `.bin`. Raises UserError if the index is damaged."""
    _header(prefix)
    with idx_path(prefix).open("rb") as file:
        return np.dtype(_DTYPES[file.read(len(_INDEX_MAGIC) + 9)[-1]])


def document_lengths(prefix: Path) -> np.ndarray:
    """Tokens of every document, int32, read from the index as they are needed. Raises UserError if it is damaged."""
    body, _, sequences, _ = _header(prefix)
    return body[: 4 * sequences].view("<i4")


def _damaged(prefix: Path, what: str) -> UserError:
    return UserError(f"{idx_path(prefix)} is damaged ({what}): restore it, or prepare the data again")


def check_prefix(prefix: Path, vocab_size: int | None = None) -> tuple[int, int]:
    """(documents, tokens) of a `.bin/.idx` pair, from its structure alone. Raises UserError if a file is missing or
    truncated, contradicts itself or the other, or holds token ids that a model of ``vocab_size`` does not have."""
    body, width, sequences, entries = _header(prefix)
    if was_interrupted(prefix):
        raise UserError(f"the preparation of {prefix} was interrupted: run `qwen-moe data prepare` again")
    tokens = 0
    for first in range(0, sequences, _CHUNK):
        last = min(first + _CHUNK, sequences)
        lengths = body[4 * first : 4 * last].view("<i4").astype(np.int64)
        at = 4 * sequences
        pointers = body[at + 8 * first : at + 8 * last].view("<i8")
        ends = tokens + lengths.cumsum()
        if lengths.min(initial=0) < 0 or not np.array_equal(pointers, (ends - lengths) * width):
            raise _damaged(prefix, f"lengths and pointers of sequences {first:,} to {last - 1:,} contradict each other")
        tokens = int(ends[-1])
    bounds = body[12 * sequences :].view("<i8")
    ordered = all((np.diff(bounds[n : n + _CHUNK + 1]) >= 0).all() for n in range(0, max(entries - 1, 0), _CHUNK))
    if not entries or bounds[0] != 0 or bounds[-1] != sequences or not ordered:
        raise _damaged(prefix, "its document index does not run from the first to the last sequence")
    size = bin_path(prefix).stat().st_size
    if size != tokens * width:
        raise UserError(
            f"{bin_path(prefix)} has {size} bytes, expected {tokens * width} ({tokens} tokens of {width} bytes): it is "
            "truncated or belongs to another index; prepare the data again"
        )
    manifest = read_manifest(prefix)
    if manifest is not None and vocab_size is not None and manifest.max_token_id >= vocab_size:
        raise UserError(
            f"{prefix} holds token id {manifest.max_token_id} but model.vocab_size is {vocab_size}: raise it to at least "
            f"{manifest.vocab_size}, the size of the tokenizer {manifest.tokenizer}"
        )
    return entries - 1, tokens


def verify_content(prefix: Path, *, record: Path | None = None, whole: bool = False) -> Content:
    """Check a pair's structure, and its content against `PREFIX.json` if there is one.

    ``record``: a file that remembers complete checks of large files. ``whole``: hash everything, even if it is remembered.
    Raises UserError if anything differs.
    """
    documents, tokens = check_prefix(prefix)
    manifest = read_manifest(prefix)
    digest = sha256 if whole else unchanged_sha256
    index = digest(idx_path(prefix))
    if manifest is not None and index != manifest.idx_sha256:
        raise _changed(idx_path(prefix), manifest.idx_sha256, index)
    data = bin_path(prefix)
    known = None
    if not whole and data.stat().st_size > WHOLE_BYTES:
        known = _known(data, manifest, record)
    found = known or digest(data)
    if manifest is not None and found != manifest.bin_sha256:
        raise _changed(data, manifest.bin_sha256, found)
    if known is None and record is not None and data.stat().st_size > WHOLE_BYTES:
        _remember(record, data, found)
    columns = _verified_columns(prefix, manifest, digest) if manifest is not None else ()
    return Content(
        documents=documents,
        tokens=tokens,
        bin_sha256=found,
        idx_sha256=index,
        signature=signature(prefix),
        columns=columns,
    )


def _verified_columns(prefix: Path, manifest: PreparedData, digest: Callable[[Path], str]) -> tuple[str, ...]:
    """The SHA-256 of every column. Raises UserError if one is missing or differs."""
    for name, wanted in manifest.columns.items():
        path = column_path(prefix, name)
        if not path.is_file():
            raise UserError(
                f"{path} does not exist, but {prefix.name}.json names it: restore it, or prepare the data again"
            )
        if (found := digest(path)) != wanted:
            raise _changed(path, wanted, found)
    return tuple(manifest.columns.values())


def _changed(path: Path, wanted: str, found: str) -> UserError:
    return UserError(
        f"{path} is not what was prepared (SHA-256 {found[:16]}, was {wanted[:16]}): it has been changed or damaged; "
        "restore it, or prepare the data again"
    )


@dataclass(frozen=True)
class _Record:
    """The state of a `.bin` when it was hashed completely."""

    size: int
    mtime_ns: int
    inode: int
    sample: str
    sha256: str


def _known(data: Path, manifest: PreparedData | None, record: Path | None) -> str | None:
    """The known SHA-256 of a large file if its status and its sample have not changed since; otherwise None."""
    status = data.stat()
    sample = sample_sha256(data)
    if manifest is not None and manifest.bin_sample_sha256:
        if sample != manifest.bin_sample_sha256:
            raise _changed(data, manifest.bin_sample_sha256, sample)
        if (status.st_size, status.st_mtime_ns) == (manifest.bin_bytes, manifest.bin_mtime_ns):
            return manifest.bin_sha256
    kept = _read_record(record).get(str(data.resolve())) if record is not None else None
    if kept and kept[:4] == [status.st_size, status.st_mtime_ns, status.st_ino, sample]:
        return str(kept[4])
    return None


def _read_record(record: Path) -> dict[str, list[Any]]:
    """The remembered checks; empty if the file is missing or damaged, so that everything is checked again."""
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        entries: dict[str, list[Any]] = kept["files"]
        return entries if kept["checksum"] == _checksum(entries) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _checksum(entries: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _remember(record: Path, data: Path, found: str) -> None:
    status = data.stat()
    entry = _Record(status.st_size, status.st_mtime_ns, status.st_ino, sample_sha256(data), found)
    entries = _read_record(record) | {str(data.resolve()): list(asdict(entry).values())}
    write_text(record, json.dumps({"files": entries, "checksum": _checksum(entries)}))
