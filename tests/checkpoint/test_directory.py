"""Checkpoint directories: whole or not there, damage found, old ones removed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.checkpoint.aside import written_aside
from qwen_moe.checkpoint.directory import (
    commit,
    file_entry,
    files_in,
    list_checkpoints,
    partial_path,
    step_directories,
    step_directory,
    verify,
)
from qwen_moe.checkpoint.manifest import MANIFEST, CheckpointDamaged
from qwen_moe.checkpoint.retention import Retention
from qwen_moe.errors import UserError


def write_checkpoint(root: Path, step: int) -> Path:
    path = step_directory(root, step)
    partial = partial_path(path)
    (partial / "sub").mkdir(parents=True)
    (partial / "weights").write_bytes(bytes(range(256)) * 40)
    (partial / "sub" / "name.json").write_text("{}")
    (partial / ".metadata").write_bytes(b"metadata")
    (partial / "model_config.json").write_text("{}")
    commit(path, {file.as_posix(): file_entry(partial / file) for file in files_in(partial)}, {"step": step})
    return path


def test_a_committed_checkpoint_verifies_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3)
    verify(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]
    assert json.loads((path / MANIFEST).read_text())["step"] == 3


def test_all_of_it_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure a name that was written earlier than its content holds zeros."""
    on_disk: set[int] = set()
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    def replace(source: Path, target: Path) -> None:
        for path in (source, *(path for path in source.rglob("*") if path.is_file())):
            assert path.stat().st_ino in on_disk, path
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    path = write_checkpoint(tmp_path, 3)
    assert path.is_dir() and tmp_path.stat().st_ino in on_disk


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


def _rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest of the first format, which has no checksum of itself, with a change."""
    values = json.loads((path / MANIFEST).read_text())
    del values["checksum"]
    values["format"] = 1
    change(values)
    (path / MANIFEST).write_text(json.dumps(values))


def _nest(path: Path) -> None:
    (path / MANIFEST).write_text('{"files":' + "[" * 100_000)


def _link_out(path: Path) -> None:
    (path / "weights").rename(path.parent / "elsewhere")
    (path / "weights").symlink_to(path.parent / "elsewhere")


def _name(name: str) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, lambda values: values["files"].update({name: values["files"]["weights"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "5 bytes, expected 10240"),
        (_flip_a_bit, "SHA-256"),
        (_remove, "missing"),
        (_garble_manifest, "not readable"),
        (_nest, "not readable"),
        (_link_out, "'weights' is a link that leads out of"),
        (lambda path: (path / MANIFEST).write_text("[]"), "a JSON object is expected, found list"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), "not readable"),
        (lambda path: (path / MANIFEST).write_text('{"format": 1, "format": 1}'), "a name occurs twice"),
        (lambda path: _rewrite(path, lambda values: values.update(files={})), "does not list .metadata"),
        (lambda path: _rewrite(path, lambda values: values.pop("files")), "it lists no files"),
        (
            lambda path: _rewrite(path, lambda values: values["files"].pop("model_config.json")),
            "does not list model_config",
        ),
        (lambda path: _rewrite(path, lambda values: values["files"].update(weights=3)), "the size of 'weights'"),
        (
            lambda path: _rewrite(path, lambda values: values["files"]["weights"].update(bytes=True)),
            "the size of 'weights'",
        ),
        (lambda path: _rewrite(path, lambda values: values["files"]["weights"].update(sha256="0")), "the SHA-256 of"),
        (lambda path: _rewrite(path, lambda values: values.update(compute_dtype="bf17")), "compute_dtype is 'bf17'"),
        (lambda path: _rewrite(path, lambda values: values.update(step=5)), "it is of step 5"),
        (lambda path: _rewrite(path, lambda values: values.update(format=True)), "checkpoint format True"),
        (lambda path: (path / MANIFEST).unlink(), "it has no manifest.json"),
        (_name("../weights"), "leads out of the directory"),
        (_name("/etc/passwd"), "is an absolute path"),
        (_name("C:weights"), "is an absolute path"),
        (_name("sub\\name.json"), "has a character that is not allowed"),
        (_name("weights\0"), "has a character that is not allowed"),
        (_name("\ud800"), "has a character that is not allowed"),
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


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7)
    _rewrite(path, lambda values: None)
    verify(path)


@pytest.mark.parametrize("version", [1, 2])
def test_no_flipped_bit_of_a_manifest_passes_for_another_manifest(tmp_path: Path, version: int) -> None:
    """Every single bit: noticed, or (only in the format without a checksum) without effect on what is checked."""
    path = write_checkpoint(tmp_path, 1)
    if version == 1:
        _rewrite(path, lambda values: None)
    whole = (path / MANIFEST).read_bytes()
    files = json.loads(whole)["files"]
    noticed = 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (path / MANIFEST).write_bytes(content)
        try:
            verify(path)
        except CheckpointDamaged:
            noticed += 1
        else:
            assert version == 1 or json.loads(content) == json.loads(whole), (bit, bytes(content))
            assert json.loads(content)["files"] == files
    # Signs between the values, and in the first format the names of what is not looked at.
    assert noticed > 0.9 * 8 * len(whole)


def _steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def _damage(root: Path, *steps: int) -> None:
    for step in steps:
        _flip_a_bit(step_directory(root, step))


def _write(root: Path, retention: Retention, *steps: int) -> None:
    for step in steps:
        write_checkpoint(root, step)
        retention.written(step)


def test_the_newest_are_kept_by_step_number(tmp_path: Path) -> None:
    partial_path(step_directory(tmp_path, 7)).mkdir()
    _write(tmp_path, Retention(tmp_path, keep=2), 5, 30, 100_000_000)
    assert _steps(tmp_path) == ["step_00000030", "step_100000000"]
    write_checkpoint(tmp_path, 200)
    steps = [30, 200, 100_000_000]  # by their names, 100,000,000 would come before the others
    assert list(step_directories(tmp_path)) == steps
    assert list_checkpoints(tmp_path) == [step_directory(tmp_path, step) for step in steps]


@pytest.mark.parametrize(("keep", "damaged"), [(1, (3, 4)), (2, (3, 4)), (4, (3, 4)), (1, (1, 2, 3, 4)), (2, (4,))])
def test_damaged_newer_checkpoints_never_push_out_a_good_one(
    tmp_path: Path, keep: int, damaged: tuple[int, ...]
) -> None:
    """Steps 10 to 40, the newest damaged; the run goes on from the newest good one and is stopped soon after."""
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    _damage(tmp_path, *(10 * number for number in damaged))
    start = 10 * (min(damaged) - 1)
    retention = Retention(tmp_path, keep)
    retention.went_back_to(start)
    _write(tmp_path, retention, start + 1)
    good = [step for step in (10, 20, 30) if step <= start] + [start + 1]
    assert list(step_directories(tmp_path)) == good[-keep:]
    for path in step_directories(tmp_path).values():
        verify(path)
    # Damaged ones are still there, under a name that is not looked at, until the run is past them.
    assert [name for name in _steps(tmp_path) if name.endswith(".abandoned")] == [
        f"step_{10 * number:08d}.abandoned" for number in damaged if 10 * number > start + 1
    ]
    _write(tmp_path, retention, 40)
    assert list(step_directories(tmp_path)) == [*good, 40][-keep:]
    assert not [name for name in _steps(tmp_path) if not name.removeprefix("step_").isdigit()]


def test_an_abandoned_checkpoint_that_can_be_read_again_does_not_count(tmp_path: Path) -> None:
    """It was unreadable when the run fell back to 10; 15 is passed by without being written again."""
    for step in (10, 15, 20):
        write_checkpoint(tmp_path, step)
    retention = Retention(tmp_path, keep=3)
    retention.went_back_to(10)
    _write(tmp_path, retention, 18)
    assert list(step_directories(tmp_path)) == [10, 18]


def test_older_checkpoints_are_checked_only_where_one_would_push_out_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    _damage(tmp_path, 3)
    checked: list[str] = []
    monkeypatch.setattr(
        "qwen_moe.checkpoint.retention.verify", lambda path: (checked.append(path.name), verify(path))[1]
    )
    retention = Retention(tmp_path, keep=3)
    retention.went_back_to(4)
    _write(tmp_path, retention, 5)
    assert list(step_directories(tmp_path)) == [2, 4, 5]
    assert checked == ["step_00000003", "step_00000002"]
    _write(tmp_path, retention, 6, 7)
    assert list(step_directories(tmp_path)) == [5, 6, 7] and len(checked) == 2


def test_steps_to_keep_stay_unless_they_are_abandoned(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    _damage(tmp_path, 4)
    retention = Retention(tmp_path, keep=1, keep_steps=(1, 4))
    retention.went_back_to(3)
    _write(tmp_path, retention, 5)
    assert list(step_directories(tmp_path)) == [1, 5]


def test_after_going_back_in_the_run_what_lies_past_it_counts_no_more(tmp_path: Path) -> None:
    retention = Retention(tmp_path, keep=2)
    _write(tmp_path, retention, 2, 4)
    _damage(tmp_path, 4)
    retention.went_back_to(2)
    _write(tmp_path, retention, 3)
    assert list(step_directories(tmp_path)) == [2, 3]
    assert "step_00000004.abandoned" in _steps(tmp_path)


def test_a_checkpoint_that_is_a_link_is_unlinked_and_its_target_kept(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    os.symlink(write_checkpoint(tmp_path / "disk", 1), step_directory(root, 1))
    verify(step_directory(root, 1))
    _write(root, Retention(root, keep=1), 2)
    assert _steps(root) == ["step_00000002"]
    verify(step_directory(tmp_path / "disk", 1))


def test_a_second_process_leaves_what_the_first_one_writes(tmp_path: Path) -> None:
    target = tmp_path / "made" / "weights"
    with written_aside(target) as first:
        (first / "one").write_text("1")
        refused = pytest.raises(UserError, match=r"weights is being written by process \d+ on .*: wait for it, or give")
        with refused, written_aside(target):
            raise AssertionError
        assert (first / "one").read_text() == "1"
        os.replace(first, target)
    with pytest.raises(UserError, match="exists and is not empty"), written_aside(target):
        raise AssertionError
    assert [path.name for path in target.parent.iterdir()] == ["weights"]


def test_a_lock_file_that_a_killed_process_left_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / "weights.lock").write_text("1 elsewhere qwen-moe convert\n")
    with written_aside(tmp_path / "weights") as first:
        os.replace(first, tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
