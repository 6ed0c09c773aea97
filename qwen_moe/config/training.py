"""How a run learns: the sections training, optimizer, schedule and balance."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qwen_moe.config.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    ShareBelowOne,
    Size,
)

Recompute = Literal["none", "selective", "full"]


class TrainingConfig(Section):
    """Training length and batch sizes. Batch sizes count sequences; ``train_tokens`` counts tokens of all ranks, with their
    padding. ``epochs``: of conversations or pairs, instead; ``train_tokens`` is then set when the data are read.
    ``recompute``: what backward computes again instead of keeping it: nothing, whole layers (full), or layers except
    attention itself, whose cost grows with the square of the sequence (selective).

    If a loss is NaN, infinite or (with ``spike_nats`` > 0) that far above the median of recent losses, the step is not
    taken: the run goes back to its newest checkpoint and skips the batches since then, at most ``max_skips`` times.
    """

    train_tokens: NonNegativeInt = 0
    epochs: NonNegativeInt = 0
    micro_batch_size: Size
    global_batch_size: Size
    validation_interval: NonNegativeInt = 200
    validation_sequences: Size = 64
    max_skips: NonNegativeInt = 3
    spike_nats: NonNegativeFloat = 0.0
    recompute: Recompute = "none"
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
