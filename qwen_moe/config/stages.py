"""Stages of a run: what each changes of the settings before it, and where each begins.

A stage states its differences from the stage before it; the first states its differences from the recipe. Batch sizes and
lengths decide how many steps its ``tokens`` take, rounded up to whole steps, so a stage begins at a whole step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, create_model, model_validator

from qwen_moe.config.data import DataConfig
from qwen_moe.config.fields import LARGEST_SEED, PositiveInt, Section
from qwen_moe.config.model import ModelConfig
from qwen_moe.config.system import ParallelConfig
from qwen_moe.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig


def _some_of(section: type[Section], *keys: str) -> Any:
    """A section of the settings ``keys`` of ``section`` (all if none are named), any of which may be left out."""
    fields: dict[str, Any] = {
        key: (field.rebuild_annotation() | None, None)
        for key, field in section.model_fields.items()
        if not keys or key in keys
    }
    return create_model(f"{section.__name__}OfStage", __base__=Section, **fields)


class StageData(_some_of(DataConfig, "sequence_length", "train", "long_share")):  # type: ignore[misc]
    """What a stage may change of the data: the length of sequences, the blend, and its mix of lengths."""


class StageModel(_some_of(ModelConfig, "rope_theta")):  # type: ignore[misc]
    """What a stage may change of the model: the base of RoPE, which no weight depends on."""


class StageTraining(_some_of(TrainingConfig, "micro_batch_size", "global_batch_size")):  # type: ignore[misc]
    """What a stage may change of the training section; its length is the stage's ``tokens``."""


class StageOptimizer(_some_of(OptimizerConfig, "learning_rate")):  # type: ignore[misc]
    """What a stage may change of the optimizer, whose state goes on."""


class StageParallel(_some_of(ParallelConfig)):  # type: ignore[misc]
    """What a stage changes of the layout; the number of processes stays the same."""


class StageConfig(Section):
    """One stage. ``schedule`` is a whole section, not a difference. A stage that gives ``schedule`` or
    ``optimizer.learning_rate`` begins its schedule anew: it spans this stage and those after it, up to the next that gives
    one of the two."""

    name: str = Field(min_length=1, max_length=60)
    tokens: PositiveInt
    data: StageData = StageData()
    model: StageModel = StageModel()
    training: StageTraining = StageTraining()
    optimizer: StageOptimizer = StageOptimizer()
    schedule: ScheduleConfig | None = None
    parallel: StageParallel = StageParallel()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.name.isprintable() or self.name != self.name.strip():
            raise ValueError(f"name {self.name!r} has spaces around it or characters that cannot be printed: change it")
        return self

    @property
    def begins_schedule(self) -> bool:
        return self.schedule is not None or bool(self.optimizer.model_dump(exclude_none=True))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stage lies in its run. A run without stages is one stage without a name.

    ``first_step``, ``first_samples``, ``first_tokens``: how many are done when it begins. Its learning rates follow a
    schedule over ``rates_tokens`` tokens that begins when ``rates_from`` tokens are done.
    """

    name: str = ""
    index: int = 0
    first_step: int = 0
    first_samples: int = 0
    first_tokens: int = 0
    rates_from: int = 0
    rates_tokens: int = 0

    @property
    def label(self) -> str:
        """What a message about this stage begins with; empty for a run without stages."""
        return f"stages.{self.index} ({self.name}): " if self.name else ""


def values_of_stages(values: dict[str, Any], stages: Sequence[StageConfig]) -> list[dict[str, Any]]:
    """The settings of each stage as a run of its own, from the run's (``values``, dumped). Each has a seed of its own for
    its data."""
    found = []
    seed = values["data"]["seed"]
    for index, stage in enumerate(stages):
        changes = stage.model_dump(exclude_none=True, exclude={"name", "tokens", "schedule"})
        values = values | {section: values[section] | changed for section, changed in changes.items()}
        if stage.schedule is not None:
            values["schedule"] = stage.schedule.model_dump()
        values["training"] = values["training"] | {"train_tokens": stage.tokens}
        # Else stages of the same length and blend would read the same samples in the same order.
        values["data"] = values["data"] | {"seed": (seed + index) % (LARGEST_SEED + 1)}
        found.append({key: value for key, value in values.items() if key != "stages"})
    return found


def places_of(stages: Sequence[StageConfig], batches: Iterable[tuple[int, int]]) -> list[Place]:
    """Where each stage lies; ``batches``: the sequences and the tokens of each one's steps."""
    starts: list[tuple[int, int, int]] = []  # steps, samples and tokens before each stage
    steps = samples = tokens = 0
    for stage, (rows, per_step) in zip(stages, batches, strict=True):
        starts.append((steps, samples, tokens))
        count = -(-stage.tokens // per_step)
        steps, samples, tokens = steps + count, samples + count * rows, tokens + count * per_step
    found = []
    begin = 0
    for index, stage in enumerate(stages):
        if stage.begins_schedule:
            begin = index
        last = index
        while last + 1 < len(stages) and not stages[last + 1].begins_schedule:
            last += 1
        rates_from = starts[begin][2]
        found.append(
            Place(
                name=stage.name,
                index=index,
                first_step=starts[index][0],
                first_samples=starts[index][1],
                first_tokens=starts[index][2],
                rates_from=rates_from,
                rates_tokens=starts[last][2] + stages[last].tokens - rates_from,
            )
        )
    return found
