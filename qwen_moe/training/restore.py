"""The start of a run: its own newest checkpoint, another run's checkpoint, another run's weights, or initial values."""

from pathlib import Path
from typing import Any

from launchers.folder.run_folder import CHECKPOINTS
from qwen_moe.checkpoint.distributed import load_weights, resume
from qwen_moe.checkpoint.train_state import TrainState
from qwen_moe.checkpoint.valid import newest_valid, valid_one
from qwen_moe.config import RunConfig
from qwen_moe.data.inputs import RunInputs
from qwen_moe.errors import UserError
from qwen_moe.runs.identity import ON_RESUME, Rule, differences, rule_of
from qwen_moe.training.branch import check_branch
from qwen_moe.training.extension import check_length, is_of_another_length, set_aside_export
from qwen_moe.training.rollback import History
from qwen_moe.training.step import Trainer


def restore(config: RunConfig, trainer: Trainer, inputs: RunInputs, say: Any) -> tuple[int, History]:
    """Resume from the run's newest valid checkpoint; else continue from `checkpoint.branch_from`, load the weights of
    `checkpoint.load_from`, or start from initial values. Returns the steps done and the history."""
    root = config.run_dir / CHECKPOINTS
    path, problems = newest_valid(root)
    for problem in problems:
        say(f"warning: this checkpoint is damaged and not used: {problem}")
    if problems:
        say(f"falling back to {path.name if path else 'step 0: this run has no undamaged checkpoint'}")
    if path is not None:
        state = resume(path, trainer.model, trainer.optimizer, config.model)
        changed = differences(state.settings, config, ON_RESUME)
        if other := [d for d in changed if rule_of(d.name) != Rule.HORIZON]:
            raise UserError(
                f"{config.run_dir} holds a run with other settings: {'; '.join(map(str, other))}. Restore them to continue "
                "the run, or use another run_dir (checkpoint.load_from starts a new run from its weights)"
            )
        check_length(config, changed, state.step)
        if not is_of_another_length(config, state, inputs):
            _check_data(state, inputs, config.run_dir)
        set_aside_export(config, changed, say)
        say(f"resumed from {path} (step {state.step} of {config.train_steps})")
        return state.step, History.restored(state.skips, state.recent_losses)
    if config.checkpoint.branch_from is not None:
        path = config.checkpoint.branch_from
        if wrong := valid_one(path):
            raise UserError(f"checkpoint.branch_from {path}: {wrong}; train the run that it belongs to first")
        state = resume(path, trainer.model, trainer.optimizer, config.model)
        check_branch(config, state.settings, state.step, path)
        _check_data(state, inputs, path)
        say(f"branched from {path} (step {state.step} of {config.train_steps})")
        return state.step, History.restored(state.skips, state.recent_losses)
    if config.checkpoint.load_from is not None:
        from qwen_moe.checkpoint.resolve import resolve_checkpoint

        source = resolve_checkpoint(config.checkpoint.load_from)
        load_weights(source, trainer.model, config.model)
        say(f"weights loaded from {source}")
    return 0, History()


def _check_data(state: TrainState, inputs: RunInputs, where: Path) -> None:
    if not inputs.is_of_this_data(state.data_fingerprint):
        raise UserError(
            f"{where} was trained on other data, or in another order (fingerprint {state.data_fingerprint}, now "
            f"{inputs.fingerprint}): restore the data section and files (for a branch, data.order_tokens too), or use "
            "another run_dir"
        )
