"""A run whose length has changed. It may continue if its finished steps are also those of a run of the new length."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launchers.counted import counted
from qwen_moe.checkpoint.directory import step_directory
from qwen_moe.checkpoint.train_state import TrainState
from qwen_moe.config import RunConfig
from qwen_moe.data.inputs import OrderedInputs, ordered_steps
from qwen_moe.errors import UserError
from qwen_moe.runs.finish import HF
from qwen_moe.runs.identity import Difference, Rule, differences
from qwen_moe.training.schedule import first_other_rate, learning_rate

_ELSE = "restore the setting, or use another run_dir (checkpoint.load_from starts a new run from these weights)"


def with_length(config: RunConfig, tokens: int) -> RunConfig:
    """``config`` for a run of ``tokens`` tokens; not validated again."""
    training = config.training.model_copy(update={"train_tokens": tokens})
    return config.model_copy(update={"training": training})


def check_length(config: RunConfig, changed: Iterable[Difference], step: int) -> None:
    """Raise UserError if `training.train_tokens` changed and the first ``step`` steps would have had other learning rates in
    a run of the new length. `is_of_another_length` checks the order of the data."""
    length = next((difference for difference in changed if difference.name == "training.train_tokens"), None)
    if length is None:
        return
    if not _is_count(length.before) or length.before == 0:
        raise UserError(f"{config.run_dir} holds a run with other settings: {length}; {_ELSE}")
    if step > config.train_steps:
        raise UserError(
            f"{config.run_dir} holds a longer run: {length}, which is {counted(config.train_steps, 'step')}, and "
            f"{step:,} are done. "
            f"Set at least {step * config.tokens_per_step} tokens; or {_ELSE}"
        )
    before = with_length(config, length.before)
    other = first_other_rate(before, config, step)
    if other is not None:
        raise UserError(
            f"{config.run_dir} cannot continue with another length: {length}. With the new length the learning rate of step "
            f"{other + 1:,}, which is done, would have been {learning_rate(config, other):.3e} instead of "
            f"{learning_rate(before, other):.3e}. {_why(before)}; or {_ELSE}"
        )


def is_of_another_length(config: RunConfig, state: TrainState, inputs: OrderedInputs) -> bool:
    """Whether the checkpoint was trained on this data in the order for another training length that begins with the same
    samples. Raises UserError if that order begins with other samples. All ranks must call it."""
    if inputs.is_of_this_data(state.data_fingerprint):
        return False
    length = inputs.length_with(state.data_fingerprint, _earlier_lengths(config, state.settings))
    if length is None:
        return False
    first = config.place.first_step
    read = state.step - first + sum(batches for step, batches in state.skips if step >= first)
    if read <= ordered_steps(config, length) and inputs.begins_as(length, read):
        return True
    if config.place.name:
        raise UserError(
            f"{config.place.label}its length cannot change any more: {config.training.train_tokens} tokens are read in "
            f"another order than {length}, its earlier length (several passes are shuffled as a whole), and {read:,} "
            "batches have been read. Restore its tokens, and add another stage after it instead"
        )
    now = max(config.data.order_tokens, config.training.train_tokens)
    raise UserError(
        f"{config.run_dir} cannot continue with another length: a run of {now} tokens reads the data in another order than "
        f"one of {length}, its earlier length (several passes are shuffled as a whole), and "
        f"{counted(read, 'batch has', 'batches have')} been "
        "read. Restore training.train_tokens and data.order_tokens. For runs that may become longer, set data.order_tokens "
        "to the largest length from the beginning"
    )


def _earlier_lengths(config: RunConfig, saved: dict[str, Any]) -> list[int]:
    """Lengths in tokens for which a run with settings ``saved`` may have drawn its data order. Checkpoints of earlier
    versions do not record `data.order_tokens`: it was then either what it is now, or not set."""
    before = {d.name: d.before for d in differences(saved, config, {Rule.HORIZON})}
    tokens = before.get("training.train_tokens", config.training.train_tokens)
    orders = [before.get("data.order_tokens", config.data.order_tokens), 0]
    return [max(tokens, order) for order in orders if _is_count(tokens) and _is_count(order)]


def set_aside_export(config: RunConfig, changed: Iterable[Difference], say: Callable[[str], None]) -> None:
    """Rename the export of the run's earlier end, so that its name has that step."""
    before = next((d.before for d in changed if d.name == "training.train_tokens"), None)
    if before is not None:
        move_export(config, with_length(config, before).train_steps, say)


def move_export(config: RunConfig, step: int, say: Callable[[str], None]) -> None:
    """Rename the export of a run that ended with ``step``, if there is one, so that its name has that step."""
    if dist.get_rank() != 0:
        return
    export = config.run_dir / HF
    aside = export.with_name(f"{HF}_{step_directory(Path(), step).name}")
    if export.exists() and not aside.exists():
        os.replace(export, aside)
        say(f"{export} is from the run's earlier end: kept as {aside}")


def _is_count(value: Any) -> bool:
    """Whether a value from a checkpoint is a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _why(config: RunConfig) -> str:
    """Explain which part of the schedule depends on the length."""
    schedule = config.schedule
    if schedule.kind == "cosine":
        return (
            "A cosine reaches to the end of the run, so its rates depend on the length from the end of the warm-up on: use "
            "schedule.kind wsd or constant from the beginning for runs that may become longer"
        )
    decay = max(0, config.training.train_tokens - schedule.decay_tokens) // config.tokens_per_step
    return (
        f"The final decay of {schedule.decay_tokens} tokens began after step {decay:,}, and a run can change its length "
        "only before its old and its new decay begin: start a run with another run_dir whose checkpoint.branch_from is the "
        "path of an earlier checkpoint (checkpoint.keep_steps keeps one)"
    )
