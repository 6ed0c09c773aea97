"""Checkpoint directories: whole or not there, damage found, old ones removed."""

import json
from pathlib import Path

import pytest

from qwen_moe.checkpoint.directory import (
    MANIFEST,
    CheckpointDamaged,
    commit,
    file_entry,
    files_in,
    list_checkpoints,
    partial_path,
    remove_old,
    step_directory,
    verify,
)


def write_checkpoint(root: Path, step: int) -> Path:
    path = step_directory(root, step)
    partial = partial_path(path)
    (partial / "sub").mkdir(parents=True)
    (partial / "weights").write_bytes(bytes(range(256)) * 40)
    (partial / "sub" / "name.json").write_text("{}")
    commit(path, {file.as_posix(): file_entry(partial / file) for file in files_in(partial)}, {"step": step})
    return path


def test_a_committed_checkpoint_verifies_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3)
    verify(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]
    assert json.loads((path / MANIFEST).read_text())["step"] == 3


def _truncate(path: Path) -> None:
    (path / "weights").write_bytes(b"short")


def _flip_a_bit(path: Path) -> None:
    content = bytearray((path / "weights").read_bytes())
    content[5000] ^= 1
    (path / "weights").write_bytes(content)


def _remove(path: Path) -> None:
    (path / "sub" / "name.json").unlink()


def _garble_manifest(path: Path) -> None:
    (path / MANIFEST).write_text('{"files": {')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "5 bytes, expected 10240"),
        (_flip_a_bit, "SHA-256"),
        (_remove, "missing"),
        (_garble_manifest, "not readable"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: object, message: str) -> None:
    path = write_checkpoint(tmp_path, 1)
    damage(path)  # type: ignore[operator]
    with pytest.raises(CheckpointDamaged, match=message):
        verify(path)


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    (write_checkpoint(tmp_path, 2) / MANIFEST).unlink()
    partial_path(step_directory(tmp_path, 3)).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]


def test_the_newest_are_kept_by_step_number(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 30):
        write_checkpoint(tmp_path, step)
    partial_path(step_directory(tmp_path, 7)).mkdir()
    remove_old(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000030", "step_100000000"]
