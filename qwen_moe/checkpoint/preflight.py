"""Checks, before any work, that the disk has room for the checkpoints of a run."""

import shutil
from pathlib import Path

from launchers.counted import counted
from qwen_moe.checkpoint.directory import list_checkpoints
from qwen_moe.config import RunConfig, stage_runs
from qwen_moe.errors import UserError
from qwen_moe.models.flops import DTYPE_BYTES, count_parameters


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one training checkpoint: weights and AdamW's two moments in the master dtype."""
    return 3 * DTYPE_BYTES[config.precision.master] * count_parameters(config.model).total


def kept_steps(config: RunConfig) -> tuple[int, ...]:
    """Steps whose checkpoints are never deleted: those that the recipe names, and the last of each stage."""
    ends = [run.end_step for run in stage_runs(config)] if config.stages else []
    return tuple(sorted({*config.checkpoint.keep_steps, *ends}))


def check_disk_space(config: RunConfig, root: Path) -> None:
    """Raise UserError unless the checkpoints still to be kept, plus one being written, fit on the disk of ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    each = checkpoint_bytes(config)
    missing = max(1, config.checkpoint.keep + len(kept_steps(config)) + 1 - len(list_checkpoints(root)))
    free = shutil.disk_usage(root).free
    if free < missing * each:
        raise UserError(
            f"{root} has {free / 1e6:,.1f} MB free but needs room for {counted(missing, 'checkpoint')} of "
            f"{each / 1e6:,.1f} MB each: "
            f"free some space, lower checkpoint.keep (now {config.checkpoint.keep}) or put run_dir elsewhere"
        )
