"""The start of a run: its own newest checkpoint, another run's checkpoint, another run's weights, or initial values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.folder.run_folder import CHECKPOINTS
from qwen_moe.checkpoint.distributed import WITHOUT_WEIGHTS, load_weights, resume
from qwen_moe.checkpoint.train_state import TrainState, read_train_state
from qwen_moe.checkpoint.valid import newest_valid, valid_one
from qwen_moe.config import RunConfig
from qwen_moe.data.inputs import OrderedInputs, tokenizer_directory
from qwen_moe.data.made_with import ids_with_other_text
from qwen_moe.errors import UserError
from qwen_moe.runs.identity import ON_RESUME, Difference, Rule, differences, rule_of
from qwen_moe.sharding.model import ParallelModel
from qwen_moe.training import stages as staged
from qwen_moe.training.branch import check_branch
from qwen_moe.training.extension import check_length, is_of_another_length, move_export, set_aside_export
from qwen_moe.training.rollback import History
from qwen_moe.training.step import Trainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run continues from, if there is one, and its state."""

    path: Path | None = None
    state: TrainState | None = None
    is_branch: bool = False

    @property
    def step(self) -> int:
        return self.state.step if self.state is not None else 0


def find_start(config: RunConfig, stages: Sequence[RunConfig], say: Say, at_most: int | None = None) -> Start:
    """The newest intact checkpoint of the run (up to step ``at_most``), else that of `checkpoint.branch_from`. Raises
    UserError if it is of another list of stages. All ranks must call it."""
    path, problems = newest_valid(config.run_dir / CHECKPOINTS, at_most)
    for problem in problems:
        say(f"warning: this checkpoint is damaged and not used: {problem}")
    if problems:
        say(f"falling back to {path.name if path else 'step 0: this run has no undamaged checkpoint'}")
    if path is not None:
        state = read_train_state(path)
        staged.check_stages(config, stages, state)
        if config.stages:
            staged.check_model(path, stages, state)
        return Start(path, state)
    path = config.checkpoint.branch_from
    if path is None:
        return Start()
    if wrong := valid_one(path):
        raise UserError(f"checkpoint.branch_from {path}: {wrong}; train the run that it belongs to first")
    state = read_train_state(path)
    if state.stages:
        raise UserError(
            f"checkpoint.branch_from {path} is of a run of stages, from which no run can branch: give checkpoint.load_from, "
            "which starts from the weights"
        )
    return Start(path, state, is_branch=True)


def restore(config: RunConfig, start: Start, trainer: Trainer, inputs: OrderedInputs, total: int, say: Say) -> History:
    """Load ``start`` into the trainer of the stage ``config``; without one, the weights of `checkpoint.load_from`, or leave
    the initial values. Returns the history. ``total``: steps of the whole run."""
    path, state = start.path, start.state
    if path is None or state is None:
        load_start(config, trainer.model, say)
        return History()
    enters = staged.begins_at(config, state.step)
    grown = staged.may_have_grown(path, config.model) if config.place.name else ()
    resume(path, trainer.model, trainer.optimizer, config.model, WITHOUT_WEIGHTS if enters else grown)
    if start.is_branch:
        check_branch(config, state.settings, state.step, path)
        _check_data(state, inputs, path)
        say(f"branched from {path} (step {state.step} of {total})")
        return History.restored(state.skips, state.recent_losses)
    changed = [] if config.place.name else _check_settings(config, state)
    if not enters and not is_of_another_length(config, state, inputs):
        _check_data(state, inputs, config.run_dir)
    if config.place.name:
        # Exports are made at a run's end: this one has got further stages since.
        if state.step < total:
            move_export(config, state.step, say)
    else:
        set_aside_export(config, changed, say)
    say(f"resumed from {path} (step {state.step} of {total})")
    return history_of(config, state)


def history_of(config: RunConfig, state: TrainState) -> History:
    """The history of a checkpoint; a stage does not compare its losses with those of the stage before."""
    return History.restored(state.skips, [] if staged.begins_at(config, state.step) else state.recent_losses)


def load_start(config: RunConfig, model: ParallelModel, say: Say) -> None:
    """Load the weights of `checkpoint.load_from` into ``model``, if it is given: of a checkpoint, a run, or a Hugging Face
    directory."""
    source = config.checkpoint.load_from
    if source is None:
        return
    from qwen_moe.checkpoint.resolve import is_ours, model_config, resolve_checkpoint, side_folder

    if not is_ours(source) and (source / "config.json").is_file():
        from qwen_moe.checkpoint.huggingface.load import load_huggingface

        base = load_huggingface(source, model, config.model).rope_theta
    else:
        source = resolve_checkpoint(source)
        load_weights(source, model, config.model)
        base = model_config(source).rope_theta
    say(f"weights loaded from {source}")
    if base != config.model.rope_theta:
        say(f"its model.rope_theta was {base:g}, and this run trains with {config.model.rope_theta:g}")
    _say_if_other_tokenizer(config, side_folder(source), say)


def _say_if_other_tokenizer(config: RunConfig, folder: Path, say: Say) -> None:
    """Not refused: reserved tokens may be renamed, and a model may be given another tokenizer on purpose."""
    directory = tokenizer_directory(config)
    if directory is None or not (folder / "tokenizer.json").is_file():
        return
    differ, shared = ids_with_other_text(directory, folder)
    if differ:
        say(
            f"warning: {differ:,} of {shared:,} token ids mean other text in the run's tokenizer {directory} than in that "
            f"of the weights, {folder}, so the weights know nothing of them: prepare the data with the tokenizer of the "
            "weights, unless this is meant"
        )


def _check_settings(config: RunConfig, state: TrainState) -> list[Difference]:
    """The settings of a run without stages that differ from the checkpoint's. Raises UserError unless it may continue."""
    changed = differences(state.settings, config, ON_RESUME)
    if other := [d for d in changed if rule_of(d.name) != Rule.HORIZON]:
        raise UserError(
            f"{config.run_dir} holds a run with other settings: {'; '.join(map(str, other))}. Restore them to continue "
            "the run, or use another run_dir (checkpoint.load_from starts a new run from its weights)"
        )
    check_length(config, changed, state.step)
    return changed


def _check_data(state: TrainState, inputs: OrderedInputs, where: Path) -> None:
    if not inputs.is_of_this_data(state.data_fingerprint):
        raise UserError(
            f"{where} was trained on other data, or in another order (fingerprint {state.data_fingerprint}, now "
            f"{inputs.fingerprint}): restore the data section and files (for a branch, data.order_tokens too), or use "
            "another run_dir"
        )
