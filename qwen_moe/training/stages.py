"""The stages of a run: which one a step is in, what checkpoints record of them, and which changes of the list may continue.

Stages that have begun must be what they were, because their steps are done; later stages may change.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_moe.checkpoint.distributed import check_same_model
from qwen_moe.checkpoint.resolve import model_config
from qwen_moe.checkpoint.train_state import TrainState
from qwen_moe.config import ModelConfig, RunConfig, StageRun
from qwen_moe.errors import UserError
from qwen_moe.runs.identity import ON_RESUME, Rule, differences, rule_of, saved_settings
from qwen_moe.sharding.layout import processes, run_layout
from qwen_moe.training.schedule import first_other_rate, learning_rate

MOST_TRIES = 1000  # to find a number of processes; each that does not fit every stage leads to the next larger one


def check_layouts(stages: Sequence[RunConfig], processes: int) -> None:
    """Raise UserError if the layout of a stage does not fit that many processes, or cannot split the sequences of an earlier
    stage, at whose length it validates too. The message names the stage."""
    for index, stage in enumerate(stages):
        lengths = {run.data.sequence_length for run in stages[:index]} - {stage.data.sequence_length}
        for length in (stage.data.sequence_length, *sorted(lengths)):
            data = stage.data.model_copy(update={"sequence_length": length})
            try:
                run_layout(stage.model_copy(update={"data": data}), processes)
            except UserError as error:
                why = f" (it validates at the earlier length {length:,} too)" if length in lengths else ""
                raise UserError(f"{stage.place.label}{error}{why}") from None


def processes_for(stages: Sequence[RunConfig], gpus: int) -> int:
    """Processes to start on this machine: those of a run without stages, or a number that every stage's layout divides.
    Raises UserError if there is none."""
    count = processes(stages[0], gpus)
    for _ in range(MOST_TRIES):
        found = []
        for stage in stages:
            count = processes(_started_with(stage, count), gpus)
            found.append(count)
        if len(set(found)) == 1:
            return count
    needed = ", ".join(f"{stage.place.name} {number}" for stage, number in zip(stages, found, strict=True))
    raise UserError(
        f"the layouts of the stages fit no common number of processes here (they take {needed}): a run keeps its number of "
        "processes, so change a degree of the parallel section or launch.nproc"
    )


def _started_with(stage: RunConfig, count: int) -> RunConfig:
    return stage.model_copy(update={"launch": stage.launch.model_copy(update={"nproc": count})})


def stage_of(stages: Sequence[RunConfig], done: int) -> RunConfig:
    """The stage of the step that follows ``done`` steps; after the last step, the last stage."""
    return next((run for run in stages if done < run.end_step), stages[-1])


def begins_at(stage: RunConfig, step: int) -> bool:
    """Whether a stage other than a run's first begins after ``step`` steps, so that its checkpoint is another stage's."""
    return step == stage.place.first_step > 0


def records(stages: Sequence[RunConfig], done: int) -> list[dict[str, Any]]:
    """What a checkpoint after ``done`` steps keeps of the stages that have begun; nothing for a run without stages."""
    return [
        {
            "name": run.place.name,
            "first_step": run.place.first_step,
            "steps": run.train_steps,
            "rates_from": run.place.rates_from,
            "rates_tokens": run.place.rates_tokens,
            "rope_theta": run.model.rope_theta,
            "settings": saved_settings(run),
        }
        for run in stages
        if isinstance(run, StageRun) and run.place.first_step < done
    ]


def check_stages(config: RunConfig, stages: Sequence[RunConfig], state: TrainState) -> None:
    """Raise UserError unless the steps that a checkpoint's run has done are also the first steps of these stages. A run
    without stages counts as one stage."""
    if not config.stages and not state.stages:
        return
    if not config.stages:
        names = ", ".join(str(record.get("name")) for record in state.stages)
        raise UserError(
            f"{config.run_dir} holds a run of stages ({names}), and this recipe has none: restore its stages, or use "
            "another run_dir (checkpoint.load_from starts a new run from its weights)"
        )
    try:
        problems = _problems(stages, state)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the checkpoint in {config.run_dir} has stages that are not those of a run: {error!r}"
        ) from None
    if problems:
        raise UserError(
            f"{config.run_dir} holds a run of other stages, of which {state.step:,} steps are done: {'; '.join(problems)}. "
            "Stages that have begun must stay as they were, and only later ones may change: restore them, or use another "
            "run_dir (checkpoint.load_from starts a new run from its weights)"
        )


def may_have_grown(path: Path, model: ModelConfig) -> tuple[str, ...]:
    """The settings of ``model`` that may be others than those of the checkpoint ``path`` of a run of stages: stages that
    follow may need longer texts, where angles do not depend on how long texts may be."""
    saved, scaling = model_config(path), model.rope_scaling
    same = (saved.trained_length, saved.rope_factor) == (model.trained_length, model.rope_factor)
    return ("max_position_embeddings",) if scaling is None or (same and scaling.type != "dynamic") else ()


def check_model(path: Path, stages: Sequence[RunConfig], state: TrainState) -> None:
    """Raise UserError unless the checkpoint ``path`` has the model of the stage that wrote it, with its RoPE."""
    writer = stage_of(stages, state.step - 1)
    check_same_model(path, writer.model, may_have_grown(path, writer.model), writer.place.label)


def _problems(stages: Sequence[RunConfig], state: TrainState) -> list[str]:
    before = state.stages or [_as_record(state)]
    begun = [run for run in stages if run.place.first_step < state.step]
    found = []
    for run, old in zip(begun, before, strict=False):
        label, end = run.place.label, old["first_step"] + old["steps"]
        if old["name"] not in (None, run.place.name) or old["first_step"] != run.place.first_step:
            found.append(f"{label}it was {old['name']}, which began after step {old['first_step']:,}")
            break
        if run.place.index + 1 < len(before) and run.end_step != end:
            found.append(f"{label}it ended with step {end:,}, and now ends with step {run.end_step:,}")
            break
        found += [f"{label}{text}" for text in _changed(run, old, state.step)]
    else:
        if len(begun) > len(before):
            first = begun[len(before)].place
            found.append(f"{first.label}it now begins after step {first.first_step:,}, within {before[-1]['name']}")
        if state.step > stages[-1].end_step:
            found.append(f"all stages together now have {stages[-1].end_step:,} steps")
    return found


def _as_record(state: TrainState) -> dict[str, Any]:
    """A run without stages as a record of its only stage."""
    tokens = state.settings["training"]["train_tokens"]
    return {
        "name": None,
        "first_step": 0,
        "steps": state.step,
        "rates_from": 0,
        "rates_tokens": tokens,
        "rope_theta": None,
        "settings": state.settings,
    }


def _changed(run: RunConfig, old: dict[str, Any], done: int) -> list[str]:
    """How a stage that has begun differs from its record; its length may, where the steps done had the same rates."""
    changed = [d for d in differences(old["settings"], run, ON_RESUME) if rule_of(d.name) != Rule.HORIZON]
    found = list(map(str, changed))
    if old["rope_theta"] not in (None, run.model.rope_theta):
        found.append(f"model.rope_theta was {old['rope_theta']!r}, is now {run.model.rope_theta!r}")
    spanned = (old["rates_from"], old["rates_tokens"])
    if found or spanned == (run.place.rates_from, run.place.rates_tokens):
        return found
    place = replace(run.place, rates_from=spanned[0], rates_tokens=spanned[1])
    # A run without stages becomes the first stage of one.
    update = {"at": place} if isinstance(run, StageRun) else {}
    earlier = run.model_copy(update=update)
    other = first_other_rate(earlier, run, min(done, run.end_step), first=run.place.first_step)
    if other is None:
        return []
    return [
        f"the learning rate of step {other + 1:,}, which is done, was {learning_rate(earlier, other):.3e} and would be "
        f"{learning_rate(run, other):.3e}, because the schedule spanned {spanned[1]:,} tokens and now spans "
        f"{run.place.rates_tokens:,} (give a later stage a schedule of its own)"
    ]
