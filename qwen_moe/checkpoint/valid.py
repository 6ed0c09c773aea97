"""Finds the newest intact checkpoint of a run. All ranks work together: each hashes its share of the files."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from qwen_moe.checkpoint.directory import step_directories, verify
from qwen_moe.checkpoint.manifest import MANIFEST, CheckpointDamaged, read_manifest, read_object
from qwen_moe.checkpoint.metadata import read_metadata
from qwen_moe.checkpoint.resolve import MODEL_CONFIG
from qwen_moe.checkpoint.train_state import TRAIN_STATE, read_train_state


def _check_contents(path: Path) -> None:
    """Raise CheckpointDamaged unless the small files are valid files of a training checkpoint."""
    files = read_manifest(path)["files"]
    if TRAIN_STATE not in files:
        raise CheckpointDamaged(f"{path} is not a checkpoint of a training run: {MANIFEST} lists no {TRAIN_STATE}")
    read_train_state(path)
    read_object(path / MODEL_CONFIG)
    read_metadata(path)


def _verified(path: Path) -> str | None:
    """None if the checkpoint is intact; otherwise what is wrong. All ranks must call this."""
    rank, world = dist.get_rank(), dist.get_world_size()
    problem: str | None = None
    try:
        names = sorted(read_manifest(path)["files"])
        verify(path, only=names[rank::world])
    except (CheckpointDamaged, OSError) as error:
        problem = str(error)
    gathered: list[str | None] = [None] * world
    dist.all_gather_object(gathered, problem)
    problem = next((found for found in gathered if found), None)
    # Read the contents only if the hashes match.
    agreed = [problem]
    if problem is None and rank == 0:
        try:
            _check_contents(path)
        except (CheckpointDamaged, OSError) as error:
            agreed = [str(error)]
    dist.broadcast_object_list(agreed, src=0)
    return agreed[0]


def newest_valid(root: Path, at_most: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under ``root``, up to step ``at_most``, that passes its check, and the problems of newer ones.
    All ranks must call this."""
    agreed: list[Any] = [None]
    if dist.get_rank() == 0:
        found = step_directories(root)
        agreed = [[str(path) for step, path in reversed(found.items()) if at_most is None or step <= at_most]]
    dist.broadcast_object_list(agreed, src=0)
    problems: list[str] = []
    for path in map(Path, agreed[0]):
        problem = _verified(path)
        if problem is None:
            return path, problems
        problems.append(problem)
    return None, problems


def valid_one(path: Path) -> str | None:
    """What is wrong with the checkpoint ``path``, or None. All ranks must call this."""
    found = [str(path) if (path / MANIFEST).is_file() else None]
    dist.broadcast_object_list(found, src=0)
    return _verified(path) if found[0] else "it is not there, or not a whole checkpoint"
