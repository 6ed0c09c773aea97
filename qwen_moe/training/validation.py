"""Validation at every sequence length that has been trained so far, so that a loss of quality on short texts shows, and on
every named set of data."""

from collections.abc import Sequence

from parallel.mesh import Axis
from qwen_moe.config import RunConfig
from qwen_moe.data.inputs import OrderedInputs, RunInputs, open_inputs, open_validation_sets
from qwen_moe.runs.recorder import Recorder
from qwen_moe.training.reference import use_reference
from qwen_moe.training.step import Trainer


def earlier_lengths(stages: Sequence[RunConfig], stage: RunConfig) -> list[RunConfig]:
    """For each shorter length of the stages before ``stage``, the last stage of that length, with ``stage``'s micro-batches:
    its validation data are those of the curve so far."""
    by_length = {run.data.sequence_length: run for run in stages[: stage.place.index]}
    by_length.pop(stage.data.sequence_length, None)
    rows = stage.training.micro_batch_size
    return [
        run.model_copy(update={"training": run.training.model_copy(update={"micro_batch_size": rows})})
        for run in by_length.values()
    ]


class Validation:
    """The validation of one stage. It records ``validation_loss`` at the stage's length, for each of `data.validation_sets`
    ``validation_loss/NAME`` there, and, in a run of stages, the loss at each length N so far as ``validation_loss_N``."""

    def __init__(
        self, stages: Sequence[RunConfig], stage: RunConfig, trainer: Trainer, inputs: OrderedInputs, dp: Axis
    ) -> None:
        self.stage, self.trainer = stage, trainer
        opened = []
        for run in earlier_lengths(stages, stage):
            opened.append(open_inputs(run, dp))
            use_reference(run, opened[-1])
        own = [inputs] if isinstance(inputs, RunInputs) else []  # a run that samples has no validation data
        self._inputs = [found for found in [*opened, *own] if found.has_validation]
        self._sets = open_validation_sets(stage, dp)
        self._engines = [trainer.engine_for(found.config.data.sequence_length) for found in self._inputs]

    def after(self, done: int, recorder: Recorder) -> None:
        """Validate every `training.validation_interval` steps and after the stage's last step. All ranks must call it."""
        interval = self.stage.training.validation_interval
        if not (self._inputs or self._sets) or not (done == self.stage.end_step or (interval and done % interval == 0)):
            return
        losses = {
            inputs.config.data.sequence_length: self.trainer.evaluate(inputs.validation_micro_batches(), engine)
            for inputs, engine in zip(self._inputs, self._engines, strict=True)
        }
        by_name = {
            name: self.trainer.evaluate(inputs.validation_micro_batches()) for name, inputs in self._sets.items()
        }
        record: dict[str, float | int] = {"step": done}
        length = self.stage.data.sequence_length
        if length in losses:
            record["validation_loss"] = losses[length]
        shown = [f"{losses[length]:.4f}"] if length in losses else []
        if self.stage.place.name:
            record |= {f"validation_loss_{tokens}": loss for tokens, loss in losses.items()}
            shown = [f"{loss:.4f} at {tokens:,} tokens" for tokens, loss in losses.items()]
        record |= {f"validation_loss/{name}": loss for name, loss in by_name.items()}
        shown += [f"{loss:.4f} of {name}" for name, loss in by_name.items()]
        recorder.event(record, f"step {done}: validation loss {', '.join(shown)}")
