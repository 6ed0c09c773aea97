"""Where and how a run runs: the sections parallel, checkpoint, logging and launch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qwen_moe.config.fields import (
    Degree,
    GivenPath,
    Layers,
    NonNegativeInt,
    OptionalLayers,
    PositiveFloat,
    PositiveInt,
    Section,
)


class ParallelConfig(Section):
    """Degrees of tensor (with sequence), pipeline, context, expert and expert-tensor parallelism. Data parallelism takes
    the other processes. Attention splits a stage's ranks into tp x cp x dp; experts split them into ep x etp x edp.

    ``schedule`` and ``stages_per_rank`` (0: the schedule's default) matter only with pp > 1. ``pipeline_split``: the number
    of layers of each stage; if empty, layers are split by cost. ``sharding``: data-parallel ranks shard optimizer state and
    gradients (zero2), and with zero3 also parameters between uses, as in ZeRO (arXiv 1910.02054).
    ``gradient_reduction``: after the ``last`` micro-batch of a step, until which each rank holds its gradients whole, or
    after ``every`` one, which holds only this rank's shards and sends more. ``check_collectives`` compares every rank's
    collectives with its group's after each step.

    ``cp_kind``: how attention reaches the keys of other cp ranks (docs/long-context.md); ``auto`` takes the kind that
    communicates least. ``cp_ulysses``: with ring or all_gather, this many neighboring cp ranks exchange tokens for heads.
    ``ep_overlap``: the halves of a micro-batch take turns, one computes while the tokens of the other travel to experts.
    """

    tp: Degree = 1
    pp: Degree = 1
    cp: Degree = 1
    cp_kind: Literal["auto", "ring", "all_gather", "ulysses"] = "auto"
    cp_ulysses: Degree = 1
    ep: Degree = 1
    etp: Degree = 1
    ep_overlap: bool = False
    schedule: Literal["1f1b", "interleaved_1f1b", "zbv", "dualpipev"] = "1f1b"
    stages_per_rank: OptionalLayers = 0
    pipeline_split: tuple[Layers, ...] = ()
    sharding: Literal["zero2", "zero3"] = "zero2"
    gradient_reduction: Literal["last", "every"] = "last"
    collective_timeout_minutes: Annotated[PositiveFloat, Field(le=60 * 24 * 30)] = 30.0
    check_collectives: bool = False

    @property
    def backward_in_halves(self) -> bool:
        """Whether the schedule computes gradients of activations first and those of weights later."""
        return self.pp > 1 and self.schedule in ("zbv", "dualpipev")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backward_in_halves and self.sharding == "zero3":
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
