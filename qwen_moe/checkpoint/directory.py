"""Atomic checkpoint directories: written aside, hashed, renamed when complete, and checked when read.

A directory is a checkpoint if it holds `manifest.json`, which is written last and lists every other file with its
size and SHA-256. The directory is written as `NAME.partial` and renamed when complete.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_moe.checkpoint.manifest import MANIFEST, CheckpointDamaged, manifest_text, read_manifest
from qwen_moe.paths import inside

_STEP = re.compile(r"step_(\d+)")


def partial_path(path: Path) -> Path:
    """Where a checkpoint is written before it is renamed to ``path``."""
    return path.with_name(path.name + ".partial")


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file; also flushes it to disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def files_in(directory: Path) -> list[Path]:
    """Relative paths of every file below ``directory`` except the manifest, sorted."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if path != Path(MANIFEST))


def commit(path: Path, entries: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Finish the checkpoint at ``partial_path(path)``: write the manifest, fsync, rename to ``path``.

    ``entries`` maps every file (relative, posix) to its `file_entry`; ``facts`` go into the manifest unchanged.
    """
    partial = partial_path(path)
    listed, present = set(entries), {file.as_posix() for file in files_in(partial)}
    assert listed == present, f"manifest and directory differ: {sorted(listed ^ present)}"
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest_text(entries, facts))
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(partial)
    os.replace(partial, path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path, only: Iterable[str] | None = None) -> None:
    """Check the sizes of all files and the hashes of ``only`` (of all files if None). Raises CheckpointDamaged, which names
    the first damaged or unreadable file."""
    entries = read_manifest(path)["files"]
    for name, entry in entries.items():
        try:
            file = inside(path, name)
        except ValueError as error:
            raise CheckpointDamaged(f"{path} is not whole: {error}") from None
        if not file.is_file():
            raise CheckpointDamaged(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointDamaged(f"{file} has {file.stat().st_size} bytes, expected {entry['bytes']}: truncated?")
    for name in entries if only is None else only:
        try:
            found = file_entry(path / name)["sha256"]
        except OSError as error:
            raise CheckpointDamaged(f"{path / name} cannot be read: {error.strerror or error}") from None
        if found != entries[name]["sha256"]:
            raise CheckpointDamaged(f"{path / name} does not match its SHA-256 in {MANIFEST}: its content changed")


def step_directory(root: Path, step: int) -> Path:
    """The path of the checkpoint of ``step`` under ``root``."""
    return root / f"step_{step:08d}"


def step_directories(root: Path) -> dict[int, Path]:
    """Every step directory under ``root`` by its step, oldest first, even damaged ones, which may lack a manifest."""
    found = {}
    if root.is_dir():
        for path in root.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def list_checkpoints(root: Path) -> list[Path]:
    """The step directories under ``root`` that have a manifest, oldest first."""
    return [path for path in step_directories(root).values() if (path / MANIFEST).is_file()]


def remove_directory(path: Path) -> None:
    """Delete a checkpoint or the remains of one. If it is a link, delete only the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
