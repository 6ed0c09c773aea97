"""RunConfig: all settings of a run, strict and frozen; which settings of different sections go together; and its stages."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Self

from pydantic import ValidationError, model_validator

from launchers.counted import counted
from qwen_moe.config.criteria import check_criteria, with_criteria
from qwen_moe.config.data import DataConfig
from qwen_moe.config.fields import GivenPath, Section, Seed, whole_number
from qwen_moe.config.model import ModelConfig
from qwen_moe.config.objective import ObjectiveConfig
from qwen_moe.config.precision import PrecisionConfig
from qwen_moe.config.rollout import RolloutConfig, check_samples
from qwen_moe.config.stages import Place, StageConfig, places_of, values_of_stages
from qwen_moe.config.system import CheckpointConfig, LaunchConfig, LoggingConfig, ParallelConfig
from qwen_moe.config.training import BalanceConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from qwen_moe.errors import wrong

NAMES = {"documents": "text", "chat": "conversations", "pairs": "pairs of answers", "samples": "its own samples"}


class RunConfig(Section):
    """One run. Everything that it writes goes to ``run_dir``. With ``stages``, the run walks through them, and the other
    sections are where the first of them starts from; `stage_runs` gives the settings of each."""

    run_dir: GivenPath
    seed: Seed = 1234
    sample_prompt: str = ""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    rollout: RolloutConfig | None = None
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    launch: LaunchConfig = LaunchConfig()
    stages: tuple[StageConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _name_objective(cls, values: Any) -> Any:
        """`objective: sft` is short for `objective: {kind: sft}`."""
        if isinstance(values, dict) and isinstance(values.get("objective"), str):
            return values | {"objective": {"kind": values["objective"]}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _add_episodes(cls, values: Any) -> Any:
        """`training.train_tokens` of a run that samples: its episodes' steps, each of as many rows as global_batch_size."""
        try:
            rollout, training, length = values["rollout"], values["training"], values["data"]["sequence_length"]
            sizes = [rollout["episodes"], rollout.get("updates_per_episode", 1), training["global_batch_size"], length]
        except (KeyError, TypeError, AttributeError):
            return values  # what is missing is reported by itself
        numbers = [whole_number(size) for size in sizes]
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            return values
        return values | {"training": {"train_tokens": math.prod(numbers)} | training}

    @model_validator(mode="before")
    @classmethod
    def _add_stages(cls, values: Any) -> Any:
        """`training.train_tokens` is the sum of the stages' tokens, if it is left out."""
        stages = values.get("stages") if isinstance(values, dict) else None
        if not isinstance(stages, list | tuple) or not stages or not isinstance(values.get("training"), dict):
            return values
        given = [whole_number(stage.get("tokens")) for stage in stages if isinstance(stage, dict)]
        # Where a stage's tokens are no number, that is the mistake that is reported.
        total = sum(tokens for tokens in given if isinstance(tokens, int)) or 1
        return values | {"training": {"train_tokens": total} | values["training"]}

    @model_validator(mode="before")
    @classmethod
    def _add_criteria(cls, values: Any) -> Any:
        return with_criteria(values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Raise ValueError if settings of different sections conflict."""
        self._check_fp8()
        self._check_kernels()
        self._check_reads()
        self._check_tokens()
        if self.training.train_tokens:
            self._check_length()
        self._check_balance()
        check_criteria(self.model.criteria, self.objective, self.sample_prompt)
        if self.stages:
            _check_stages(self)
        if self.training.train_tokens:
            self._check_keep_steps()
        if self.parallel.gradient_reduction == "every" and self.precision.master == "bf16":
            raise ValueError(
                "parallel.gradient_reduction every adds up the gradients of micro-batches in the dtype of precision.master, "
                "and bf16 loses what is small: use precision.master fp32, or parallel.gradient_reduction last"
            )
        if self.schedule.min_learning_rate > self.optimizer.learning_rate:
            raise ValueError(
                f"schedule.min_learning_rate {self.schedule.min_learning_rate} is above optimizer.learning_rate "
                f"{self.optimizer.learning_rate}"
            )
        if self.sample_prompt and not self.checkpoint.export_hf:
            raise ValueError("sample_prompt is sampled from the exported model: set checkpoint.export_hf to true")

    def _check_keep_steps(self) -> None:
        last = self.train_steps
        late = [step for step in self.checkpoint.keep_steps if step > last]
        if late:
            raise ValueError(f"checkpoint.keep_steps {late} are past the last step, {last}")

    def _check_fp8(self) -> None:
        kept = self.precision.fp8.plain_layers(self.model.num_hidden_layers)
        if self.precision.compute == "fp8" and len(kept) == self.model.num_hidden_layers:
            raise ValueError(
                f"precision.fp8.first_layers_in_bf16 {self.precision.fp8.first_layers_in_bf16} and last_layers_in_bf16 "
                f"{self.precision.fp8.last_layers_in_bf16} leave none of {counted(len(kept), 'layer')} in FP8: lower "
                "them, or set "
                "precision.compute to bf16"
            )

    def _check_kernels(self) -> None:
        if self.precision.kernels == "te" and self.parallel.backward_in_halves:
            raise ValueError(
                f"precision.kernels te cannot be combined with parallel.schedule {self.parallel.schedule}, which runs "
                "backward in two halves: Transformer Engine's layers free in the first what the second needs. Use "
                "precision.kernels torch, or parallel.schedule 1f1b or interleaved_1f1b"
            )

    def _check_reads(self) -> None:
        """Raise ValueError unless the data and the length are of the kind that the objective learns from."""
        data, training, kind = self.data, self.training, self.objective.kind
        if self.rollout is not None:
            check_samples(self)
        elif not data.train and data.prepare is None:
            raise ValueError(
                "data: there is nothing to read: give data.train (prefixes of .bin/.idx files) or data.prepare"
            )
        if not training.train_tokens and not training.epochs:
            raise ValueError(
                "training.train_tokens is missing: give it in the recipe or as training.train_tokens=VALUE"
                + ("" if self.objective.reads == "documents" else ", or give training.epochs")
            )
        if self.objective.reads == "documents":
            given: dict[str, Any] = {
                "training.epochs": training.epochs,
                "data.too_long": data.too_long != "error",
                "data.train's passes": any(one.passes > 1 for one in data.train),
                "data.prepare.learn and too_long": data.prepare is not None
                and (data.prepare.learn, data.prepare.too_long) != ("assistant", "error"),
            }
            why = f"is for conversations and pairs, and objective.kind {kind} reads text"
        else:
            given = {
                "data.respect_document_boundaries": data.respect_document_boundaries,
                "data.mask_end_of_document": data.mask_end_of_document,
                "data.long_share": data.long_share,
                "data.order_tokens": data.order_tokens,
                "data.split": data.split != type(data).model_fields["split"].default,
                "data.prepare.text_key": data.prepare is not None and data.prepare.text_key != "text",
            }
            weighted = any(one.weight != 1 for one in data.train)
            given["data.train's passes beside weights"] = weighted and any(one.passes > 1 for one in data.train)
            why = f"is for text, and objective.kind {kind} reads {NAMES[self.objective.reads]}"
            compared = kind in ("dpo", "grpo")  # with the model that the run begins from
            given["data.validation_sets"] = compared and self.data.validation_sets
            given["stages"] = self.objective.reads == "samples" and self.stages
            given["checkpoint.branch_from"] = compared and self.checkpoint.branch_from is not None
        if named := [name for name, value in given.items() if value]:
            raise ValueError(f"{named[0]} {why}: leave it out")

    def _check_tokens(self) -> None:
        training = self.training
        if training.global_batch_size % training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size {training.global_batch_size} is not a multiple of "
                f"training.micro_batch_size {training.micro_batch_size}"
            )
        # Where positions begin anew in each document its length matters, which is checked when the data are there.
        packed = self.data.respect_document_boundaries or self.objective.reads != "documents"
        if self.data.sequence_length > self.model.reach and not packed:
            scaled = " times model.rope_scaling.factor" if self.model.rope_scaling is not None else ""
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is larger than model.max_position_embeddings{scaled} "
                f"{self.model.reach}: lower the former or raise the latter, or set data.respect_document_boundaries if no "
                "document is longer"
            )
        if self.data.sequence_length > self.model.trainable_length and not packed:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is larger than {self.model.trainable_length}, up to "
                "which model.dual_chunk changes nothing: attention in training is plain, and dual chunk attention is for "
                "reading longer texts without training on them; lower the length, or leave model.dual_chunk out"
            )

    def _check_length(self) -> None:
        training, schedule = self.training, self.schedule
        tokens_per_step = training.global_batch_size * self.data.sequence_length
        if training.train_tokens < tokens_per_step:
            raise ValueError(
                f"{self._length} {training.train_tokens} is less than one step of {tokens_per_step} tokens "
                "(global_batch_size x sequence_length): train longer, or take a smaller batch"
            )
        if schedule.warmup_tokens + schedule.decay_tokens > self.place.rates_tokens:
            raise ValueError(
                f"schedule.warmup_tokens {schedule.warmup_tokens} + decay_tokens {schedule.decay_tokens} is more than "
                f"{self._scheduled} {self.place.rates_tokens}: lower them, or train longer"
            )
        if 0 < self.data.order_tokens < training.train_tokens:
            raise ValueError(
                f"data.order_tokens {self.data.order_tokens} is less than training.train_tokens {training.train_tokens}: "
                "the order would end before the run does; raise it, or leave it out"
            )

    def _check_balance(self) -> None:
        if self.balance.capacity_factor and not self.model.is_moe_family:
            raise ValueError("balance.capacity_factor is set but the model is dense: leave it out")
        if self.balance.scope == "huggingface" and self.parallel.pp > 1:
            raise ValueError(
                "balance.scope huggingface pools all layers, which pipelines cannot do: use another scope or parallel.pp=1"
            )
        if self.balance.bias_update_rate:
            if not self.model.is_moe_family:
                raise ValueError("balance.bias_update_rate is set but the model is dense: leave it out")
            if self.checkpoint.export_hf:
                raise ValueError(
                    "balance.bias_update_rate gives experts a selection bias, which Hugging Face's format cannot store: set "
                    "checkpoint.export_hf to false (`qwen-moe convert to-hf --drop-expert-bias` exports without the bias)"
                )

    @property
    def place(self) -> Place:
        """Where these settings lie in a run: they are all of it, unless they are a `StageRun`."""
        return Place(rates_tokens=self.training.train_tokens)

    @property
    def _length(self) -> str:
        """What a recipe calls the length of these settings."""
        return "training.train_tokens"

    @property
    def _scheduled(self) -> str:
        """What a recipe calls the tokens that the schedule spans."""
        return self._length

    @property
    def tokens_per_step(self) -> int:
        """Of a run of stages: as the recipe says outside of them."""
        return self.training.global_batch_size * self.data.sequence_length

    @property
    def train_steps(self) -> int:
        """The number of steps: of a run, in all its stages; of a `StageRun`, in this stage."""
        if self.stages:
            return stage_runs(self)[-1].end_step
        return math.ceil(self.training.train_tokens / self.tokens_per_step)

    @property
    def end_step(self) -> int:
        """The number of steps of the run that are done when these are."""
        return self.place.first_step + self.train_steps

    def tokens_before(self, step: int) -> int:
        """Tokens of the run before its step ``step`` (from 0), which lies in this stage."""
        return self.place.first_tokens + (step - self.place.first_step) * self.tokens_per_step


class StageRun(RunConfig):
    """The settings of one stage, as a run of its own; ``at``: where it lies in the whole run. Steps are numbered through
    the run, samples of its data from 0."""

    at: Place

    @property
    def place(self) -> Place:
        return self.at

    @property
    def _length(self) -> str:
        return "tokens"

    @property
    def _scheduled(self) -> str:
        return "the tokens that it spans,"

    def _check_keep_steps(self) -> None:
        """They are steps of the whole run, which checks them."""


def stage_runs(config: RunConfig) -> tuple[RunConfig, ...]:
    """The settings of each stage as a plain run that knows its place; of a run without stages, itself alone."""
    if not config.stages:
        return (config,)
    values = values_of_stages(config.model_dump(), config.stages)
    batches = []
    for one in values:
        rows = one["training"]["global_batch_size"]
        batches.append((rows, rows * one["data"]["sequence_length"]))
    places = places_of(config.stages, batches)
    return tuple(_stage_run(one, place) for one, place in zip(values, places, strict=True))


def _stage_run(values: dict[str, Any], place: Place) -> StageRun:
    try:
        return StageRun(**values, at=place)
    except ValidationError as error:
        found = []
        for item in error.errors():
            dotted = ".".join(map(str, item["loc"]))
            found.append(f"{dotted}: {wrong(item)}" if dotted else wrong(item))
        raise ValueError(f"{place.label}{'; '.join(found)}") from None


def _check_stages(config: RunConfig) -> None:
    """Raise ValueError unless the stages can follow one another as one run."""
    names = [stage.name for stage in config.stages]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"stages: the name {twice[0]!r} is given twice: give each stage its own")
    total = sum(stage.tokens for stage in config.stages)
    if config.training.train_tokens != total:
        raise ValueError(
            f"training.train_tokens {config.training.train_tokens} is not the sum of the stages' tokens, {total}: leave it "
            "out, it is added up"
        )
    if config.data.order_tokens:
        raise ValueError(
            f"data.order_tokens {config.data.order_tokens} is set, but each stage orders its own data: leave it out"
        )
    if config.checkpoint.branch_from is not None:
        raise ValueError(
            "checkpoint.branch_from continues inside a run, which a run of stages cannot do: give checkpoint.load_from, "
            "which starts from the weights, or leave stages out"
        )
    runs = stage_runs(config)
    for stage, run in zip(config.stages, runs, strict=True):
        warmup = run.schedule.warmup_tokens
        if stage.begins_schedule and warmup >= stage.tokens:
            raise ValueError(
                f"{run.place.label}its {stage.tokens} tokens do not reach the end of its warm-up, "
                f"schedule.warmup_tokens {warmup}: give it more tokens, or a schedule of its own with a shorter warm-up"
            )
    _check_growth(runs)
    bases = list(dict.fromkeys(run.model.rope_theta for run in runs))
    if config.objective.kind == "dpo" and len(bases) > 1:
        raise ValueError(
            f"stages have model.rope_theta {bases[0]:g} and {bases[1]:g}, and objective.kind dpo compares with the model "
            "that the run begins from, which has one: leave it out of the stages"
        )


def _check_growth(runs: Sequence[RunConfig]) -> None:
    for before, run in itertools.pairwise(runs):
        if run.data.sequence_length < before.data.sequence_length:
            raise ValueError(
                f"{run.place.label}data.sequence_length {run.data.sequence_length} is shorter than "
                f"{before.data.sequence_length} of the stage before, {before.place.name}: stages keep or raise the length, "
                "so put the shorter one first"
            )
        if run.model.rope_theta < before.model.rope_theta:
            raise ValueError(
                f"{run.place.label}model.rope_theta {run.model.rope_theta:g} is below {before.model.rope_theta:g} of the "
                f"stage before, {before.place.name}: a base that falls turns positions faster than the model has learned; "
                "keep or raise it"
            )
