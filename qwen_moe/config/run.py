"""RunConfig: all settings of a run, strict and frozen."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from qwen_moe.config.fields import (
    Degree,
    GivenPath,
    GivenPrefix,
    Layers,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalLayers,
    OptionalSize,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    ShareBelowOne,
    Size,
)
from qwen_moe.config.model import ModelConfig
from qwen_moe.config.objective import ObjectiveConfig


class Dataset(Section):
    """One `.bin/.idx` pair (`prefix` is its path without the suffix) and its weight in the blend."""

    prefix: GivenPrefix
    weight: PositiveFloat = 1.0


class Prepare(Section):
    """Data that `qwen-moe train` prepares first if it does not exist, as `qwen-moe data prepare` would."""

    input: tuple[str, ...] = Field(min_length=1)
    output: GivenPrefix
    train_tokenizer: bool = False
    vocab_size: OptionalSize = 0
    text_key: str = "text"


class DataConfig(Section):
    """The tokens to read and their order. ``split``: Megatron's train,validation,test weights over documents.
    ``order_tokens``: the training length for which the order is drawn; 0 is the run's own, and a branch sets its trunk's."""

    prepare: Prepare | None = None
    train: tuple[Dataset, ...] = ()
    validation: tuple[Dataset, ...] = ()
    tokenizer: GivenPath | None = None
    sequence_length: Size
    split: str = "99,1,0"
    seed: Seed = 1234
    order_tokens: NonNegativeInt = 0
    respect_document_boundaries: bool = False
    mask_end_of_document: bool = False

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str) -> str:
        try:
            weights = [float(part) for part in split.split(",")]
        except ValueError:
            weights = []
        if not (1 <= len(weights) <= 3 and all(0 <= w < math.inf for w in weights) and weights[0] > 0):
            raise ValueError(f"{split!r} is not of the form 'train,validation,test': give numbers, the first above 0")
        return split

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.train and self.prepare is None:
            raise ValueError("there is nothing to read: give data.train (prefixes of .bin/.idx files) or data.prepare")
        if self.prepare is not None and self.prepare.train_tokenizer == (self.tokenizer is not None):
            raise ValueError(
                "give either data.prepare.train_tokenizer: true (with vocab_size) or data.tokenizer, not both or neither"
            )
        return self


class TrainingConfig(Section):
    """Training length and batch sizes. Batch sizes count sequences; ``train_tokens`` counts tokens of all ranks.

    If a loss is NaN, infinite or (with ``spike_nats`` > 0) that far above the median of recent losses, the step is not
    taken: the run goes back to its newest checkpoint and skips the batches since then, at most ``max_skips`` times.
    """

    train_tokens: PositiveInt
    micro_batch_size: Size
    global_batch_size: Size
    validation_interval: NonNegativeInt = 200
    validation_sequences: Size = 64
    max_skips: NonNegativeInt = 3
    spike_nats: NonNegativeFloat = 0.0
    recompute: Literal["none", "full"] = "none"
    loss_chunk_tokens: Size = 1024


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (arXiv 1711.05101), which is not applied to norms and biases.

    ``provider``: the kernel that updates the weights: torch's fused one, NVIDIA Apex's, or DeepSpeed's, which keeps the
    moments in host memory (docs/optimizers.md)."""

    provider: Literal["torch", "apex", "deepspeed"] = "torch"
    learning_rate: Annotated[PositiveFloat, Field(le=100)]
    beta1: ShareBelowOne = 0.9
    beta2: ShareBelowOne = 0.95
    eps: Annotated[PositiveFloat, Field(le=1)] = 1e-8
    weight_decay: Annotated[NonNegativeFloat, Field(le=100)] = 0.1
    clip_grad_norm: NonNegativeFloat = 1.0


class ScheduleConfig(Section):
    """Learning rate over tokens: linear warm-up, then cosine decay to the end, or constant with a final decay (WSD)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_tokens: NonNegativeInt = 0
    decay_tokens: NonNegativeInt = 0
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    min_learning_rate: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "wsd" and not self.decay_tokens:
            raise ValueError("schedule.kind is wsd but decay_tokens is 0: give the length of the final decay in tokens")
        if self.kind != "wsd" and self.decay_tokens:
            raise ValueError(f"decay_tokens is only used by schedule.kind wsd, not {self.kind}: leave it out")
        return self


class BalanceConfig(Section):
    """Load balancing of experts (qwen_moe/objectives/balance.py has the definitions).

    ``capacity_factor`` > 0: in training an expert serves at most that many times its fair share of a sequence; further
    choices are dropped and counted. 0 (dropless) drops none.
    """

    scope: Literal["none", "micro_batch", "sequence", "global_batch", "huggingface"] = "global_batch"
    coefficient: Annotated[NonNegativeFloat, Field(le=1e6)] = 1e-3
    z_loss_coefficient: Annotated[NonNegativeFloat, Field(le=1e6)] = 0.0
    bias_update_rate: Annotated[NonNegativeFloat, Field(le=1e6)] = 0.0
    capacity_factor: Annotated[NonNegativeFloat, Field(le=1e6)] = 0.0


class Fp8Config(Section):
    """Scaling of the operands of FP8 matmuls (docs/fp8.md); used with ``compute`` fp8 only.

    ``recipe``: ``delayed`` (one scale per tensor, from its amax in earlier steps), ``current`` (from the current tensor),
    ``blockwise`` (1 x 128 tiles, weights 128 x 128) or ``mxfp8`` (1 x 32 blocks), as Transformer Engine defines them.
    ``format`` auto means hybrid (gradients in E5M2) for the first two and e4m3 for the others. ``amax_history_len`` (steps),
    ``amax_compute_algo`` and ``margin`` (the scale is divided by 2^margin) apply to ``delayed`` only.
    ``first_layers_in_bf16`` and ``last_layers_in_bf16``: numbers of decoder layers without FP8.
    """

    recipe: Literal["delayed", "current", "blockwise", "mxfp8"] = "blockwise"
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    amax_history_len: Annotated[PositiveInt, Field(le=1_000_000)] = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    margin: Annotated[NonNegativeInt, Field(le=64)] = 0
    first_layers_in_bf16: OptionalLayers = 0
    last_layers_in_bf16: OptionalLayers = 0

    @property
    def hybrid(self) -> bool:
        return self.format == "hybrid" or (self.format == "auto" and self.recipe in ("delayed", "current"))

    def plain_layers(self, layers: int) -> tuple[int, ...]:
        """The indices of the layers without FP8, out of ``layers`` decoder layers."""
        last = layers - self.last_layers_in_bf16
        return tuple(i for i in range(layers) if i < self.first_layers_in_bf16 or i >= last)


class PrecisionConfig(Section):
    """``compute``: dtype of matmuls and activations. ``master``: dtype of the weights that the optimizer updates.

    With ``compute`` fp8 the matmuls of attention's projections, feed-forward and experts have FP8 operands (``fp8``), and
    everything else is bf16. ``kernels``: ``torch``, ``te`` (Transformer Engine) or ``auto``, which is te for fp8 if it can
    be imported and the GPU has FP8, else torch. ``compile``: whether torch.compile fuses each elementwise chain into a
    kernel; auto does so on GPUs, and on CPUs in runs long enough to make up for the half minute of compilation.
    """

    compute: Literal["fp64", "fp32", "bf16", "fp8"] = "bf16"
    master: Literal["fp64", "fp32", "bf16"] = "fp32"
    fp8: Fp8Config = Fp8Config()
    kernels: Literal["auto", "torch", "te"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        width = {"fp8": 16, "bf16": 16, "fp32": 32, "fp64": 64}
        if self.compute != "fp8" and self.fp8 != Fp8Config():
            raise ValueError(
                f"precision.fp8 is given but precision.compute is {self.compute}: set precision.compute to fp8, or leave "
                "precision.fp8 out"
            )
        if self.fp8.recipe != "delayed":
            for name in ("amax_history_len", "amax_compute_algo", "margin"):
                if getattr(self.fp8, name) != Fp8Config.model_fields[name].default:
                    raise ValueError(
                        f"precision.fp8.{name} is only used by recipe delayed, not {self.fp8.recipe}: leave it out"
                    )
        if width[self.master] < width[self.compute]:
            raise ValueError(
                f"precision.master {self.master} is narrower than precision.compute {self.compute}: "
                "the optimizer would lose precision that the model computes; use the same dtype or a wider one"
            )
        if self.compute == "fp64" and self.compile == "always":
            raise ValueError("precision.compile always is for fp32, bf16 and fp8, not fp64: leave it out")
        if self.compute == "fp64" and self.master != "fp64":
            raise ValueError("precision.compute fp64 needs precision.master fp64")
        return self


class ParallelConfig(Section):
    """Degrees of tensor (with sequence), pipeline, context, expert and expert-tensor parallelism. Data parallelism takes
    the other processes. Attention splits a stage's ranks into tp x cp x dp; experts split them into ep x etp x edp.

    ``schedule`` and ``stages_per_rank`` (0: the schedule's default) matter only with pp > 1. ``pipeline_split``: the number
    of layers of each stage; if empty, layers are split by cost. ``sharding``: data-parallel ranks shard optimizer state and
    gradients (zero2), and with zero3 also parameters between uses, as in ZeRO (arXiv 1910.02054). ``check_collectives``
    compares every rank's collectives with its group's after each step.
    """

    tp: Degree = 1
    pp: Degree = 1
    cp: Degree = 1
    ep: Degree = 1
    etp: Degree = 1
    schedule: Literal["1f1b", "interleaved_1f1b", "zbv", "dualpipev"] = "1f1b"
    stages_per_rank: OptionalLayers = 0
    pipeline_split: tuple[Layers, ...] = ()
    sharding: Literal["zero2", "zero3"] = "zero2"
    collective_timeout_minutes: Annotated[PositiveFloat, Field(le=60 * 24 * 30)] = 30.0
    check_collectives: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pp > 1 and self.schedule in ("zbv", "dualpipev") and self.sharding == "zero3":
            raise ValueError(
                f"schedule {self.schedule} splits backward into two halves, between which torch's FSDP would free the "
                "weights that zero3 gathers (gradients would be wrong): use sharding zero2 with it, or another schedule"
            )
        return self


class CheckpointConfig(Section):
    """``keep``: how many of the newest checkpoints are kept. ``keep_steps``: steps whose checkpoints are always kept.
    ``load_from`` starts from another run's weights. ``branch_from`` continues another run's checkpoint with its optimizer,
    step and data, for example to decay from a WSD trunk; the two runs must agree up to that step."""

    interval: PositiveInt = 200
    keep: PositiveInt = 2
    keep_steps: tuple[PositiveInt, ...] = ()
    asynchronous: bool = False
    load_from: GivenPath | None = None
    branch_from: GivenPath | None = None
    export_hf: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.load_from is not None and self.branch_from is not None:
            raise ValueError("checkpoint.load_from and branch_from are both set: a run starts from one of them")
        return self


class WandbConfig(Section):
    """Arguments of `wandb.init` for Weights & Biases. ``name``: by default the run folder's name. ``mode``: by default
    WANDB_MODE, else online."""

    project: str = Field(min_length=1)
    entity: str = ""
    name: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] | None = None


class LoggingConfig(Section):
    """Recorders besides metrics.jsonl. ``tensorboard`` auto means: if it is installed. ``expert_load_interval``: steps
    between records of every expert's token count (every record has the imbalance)."""

    tensorboard: bool | Literal["auto"] = "auto"
    wandb: WandbConfig | None = None
    expert_load_interval: PositiveInt = 20


class LaunchConfig(Section):
    """``nproc``: processes that `qwen-moe train` starts on this machine unless torchrun or Slurm started it; it starts more
    if the layout needs more. ``threads``: CPU threads per process; 0 chooses."""

    nproc: Degree = 1
    threads: Annotated[NonNegativeInt, Field(le=4096)] = 0
    max_restarts_without_progress: NonNegativeInt = 10


class RunConfig(Section):
    """One run. Everything that it writes goes to ``run_dir``."""

    run_dir: GivenPath
    seed: Seed = 1234
    sample_prompt: str = ""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Raise ValueError if settings of different sections conflict."""
        self._check_fp8()
        self._check_tokens()
        self._check_balance()
        late = [step for step in self.checkpoint.keep_steps if step > self.train_steps]
        if late:
            raise ValueError(f"checkpoint.keep_steps {late} are past the last step, {self.train_steps}")
        if self.schedule.min_learning_rate > self.optimizer.learning_rate:
            raise ValueError(
                f"schedule.min_learning_rate {self.schedule.min_learning_rate} is above optimizer.learning_rate "
                f"{self.optimizer.learning_rate}"
            )
        if self.sample_prompt and not self.checkpoint.export_hf:
            raise ValueError("sample_prompt is sampled from the exported model: set checkpoint.export_hf to true")

    def _check_fp8(self) -> None:
        kept = self.precision.fp8.plain_layers(self.model.num_hidden_layers)
        if self.precision.compute == "fp8" and len(kept) == self.model.num_hidden_layers:
            raise ValueError(
                f"precision.fp8.first_layers_in_bf16 {self.precision.fp8.first_layers_in_bf16} and last_layers_in_bf16 "
                f"{self.precision.fp8.last_layers_in_bf16} leave none of {len(kept)} layers in FP8: lower them, or set "
                "precision.compute to bf16"
            )

    def _check_tokens(self) -> None:
        training, schedule = self.training, self.schedule
        if training.global_batch_size % training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size {training.global_batch_size} is not a multiple of "
                f"training.micro_batch_size {training.micro_batch_size}"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is larger than model.max_position_embeddings "
                f"{self.model.max_position_embeddings}: lower the former or raise the latter"
            )
        tokens_per_step = training.global_batch_size * self.data.sequence_length
        if training.train_tokens < tokens_per_step:
            raise ValueError(
                f"training.train_tokens {training.train_tokens} is less than one step of {tokens_per_step} tokens "
                "(global_batch_size x sequence_length)"
            )
        if schedule.warmup_tokens + schedule.decay_tokens > training.train_tokens:
            raise ValueError(
                f"schedule.warmup_tokens {schedule.warmup_tokens} + decay_tokens {schedule.decay_tokens} is more than "
                f"training.train_tokens {training.train_tokens}"
            )
        if 0 < self.data.order_tokens < training.train_tokens:
            raise ValueError(
                f"data.order_tokens {self.data.order_tokens} is less than training.train_tokens {training.train_tokens}: "
                "the order would end before the run does"
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
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.data.sequence_length

    @property
    def train_steps(self) -> int:
        return math.ceil(self.training.train_tokens / self.tokens_per_step)
