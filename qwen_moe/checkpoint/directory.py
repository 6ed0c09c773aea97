"""Checkpoint directories that a reader never sees half of: written aside, hashed, renamed; checked when read.

A directory is a checkpoint when it holds `manifest.json`, which is written last and lists every other file with its
size and SHA-256. It is written as `NAME.partial` and renamed when whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_STEP = re.compile(r"step_(\d+)")


class CheckpointDamaged(Exception):
    """A checkpoint that is incomplete or does not match its manifest; the message says what and where."""


def partial_path(path: Path) -> Path:
    """Where a checkpoint is written before it is renamed to ``path``."""
    return path.with_name(path.name + ".partial")


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file, flushed to disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def files_in(directory: Path) -> list[Path]:
    """Every file below ``directory`` but the manifest, relative, sorted."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if path != Path(MANIFEST))


def commit(path: Path, entries: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Finish the checkpoint written at ``partial_path(path)``: manifest, fsync, rename to ``path``.

    ``entries`` maps every file (relative, posix) to its `file_entry`; ``facts`` go into the manifest as they are.
    """
    partial = partial_path(path)
    listed, present = set(entries), {file.as_posix() for file in files_in(partial)}
    assert listed == present, f"manifest and directory differ: {sorted(listed ^ present)}"
    manifest = {"format": FORMAT_VERSION, **facts, "files": entries}
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
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


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointDamaged when there is none, or a half-written one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path} is not a complete checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointDamaged(f"{path / MANIFEST} is not readable: {error}") from None
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointDamaged(f"{path} has checkpoint format {manifest.get('format')!r}, expected {FORMAT_VERSION}")
    return manifest


def verify(path: Path, only: Iterable[str] | None = None) -> None:
    """Check sizes of all files and hashes of ``only`` (all when None). Raises CheckpointDamaged naming the first fault."""
    entries = read_manifest(path)["files"]
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            raise CheckpointDamaged(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointDamaged(f"{file} has {file.stat().st_size} bytes, expected {entry['bytes']}: truncated?")
    for name in entries if only is None else only:
        if file_entry(path / name)["sha256"] != entries[name]["sha256"]:
            raise CheckpointDamaged(f"{path / name} does not match its SHA-256 in {MANIFEST}: its content changed")


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies under ``root``."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """The step directories under ``root`` that have a manifest, oldest first."""
    found = []
    if root.is_dir():
        for path in root.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and (path / MANIFEST).is_file():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def remove_old(root: Path, keep: int, keep_steps: Iterable[int] = ()) -> None:
    """Delete all but the newest ``keep`` checkpoints and those of ``keep_steps``, and what an interrupted write left. A
    deletion that is itself interrupted leaves a `.partial`, never a damaged checkpoint."""
    kept = {step_directory(root, step) for step in keep_steps}
    for path in list_checkpoints(root)[:-keep]:
        if path not in kept:
            os.replace(path, partial_path(path))
    for path in root.glob("step_*.partial"):
        shutil.rmtree(path)
