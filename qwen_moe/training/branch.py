"""Branches: a run that continues from another run's checkpoint, for example to decay from a constant-rate trunk."""

from pathlib import Path
from typing import Any

from qwen_moe.config import OptimizerConfig, RunConfig, ScheduleConfig
from qwen_moe.errors import UserError
from qwen_moe.runs.identity import ON_BRANCH, differences
from qwen_moe.training.schedule import first_other_rate, learning_rate


def check_branch(config: RunConfig, saved: dict[str, Any], step: int, where: Path) -> None:
    """Raise UserError unless a run with settings ``saved`` trained, up to ``step``, as ``config`` would have: on the same
    batches with the same learning rates. Later steps may differ."""
    try:
        problems = _problems(config, saved, step)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the settings in checkpoint.branch_from {where} are not those of a run: {error!r}") from None
    if problems:
        raise UserError(f"checkpoint.branch_from {where} is of a run that differs: {'; '.join(problems)}")


def _problems(config: RunConfig, saved: dict[str, Any], step: int) -> list[str]:
    problems = []
    if step >= config.train_steps:
        problems.append(f"it is at step {step:,} and this run ends at {config.train_steps:,}")
    problems += map(str, differences(saved, config, ON_BRANCH))
    if not problems:
        trunk = config.model_copy(
            update={
                "schedule": ScheduleConfig(**saved["schedule"]),
                "optimizer": OptimizerConfig(**saved["optimizer"]),
                "training": config.training.model_copy(update={"train_tokens": saved["training"]["train_tokens"]}),
            }
        )
        # A constant rate and the rate before a decay may differ by rounding.
        other = first_other_rate(trunk, config, step, tolerance=1e-9)
        if other is not None:
            problems.append(
                f"the learning rate of step {other + 1:,} was {learning_rate(trunk, other):.3e}, is now "
                f"{learning_rate(config, other):.3e} (a branch may decay only after the step it branches at, and needs the "
                "same warm-up)"
            )
    return problems
