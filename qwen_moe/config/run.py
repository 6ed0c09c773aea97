"""RunConfig: all settings of a run, strict and frozen; and which settings of different sections go together."""

import math
from typing import Self

from pydantic import model_validator

from qwen_moe.config.data import DataConfig
from qwen_moe.config.fields import GivenPath, Section, Seed
from qwen_moe.config.model import ModelConfig
from qwen_moe.config.objective import ObjectiveConfig
from qwen_moe.config.precision import PrecisionConfig
from qwen_moe.config.system import CheckpointConfig, LaunchConfig, LoggingConfig, ParallelConfig
from qwen_moe.config.training import BalanceConfig, OptimizerConfig, ScheduleConfig, TrainingConfig


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
        if self.data.sequence_length > self.model.reach:
            scaled = " times model.rope_scaling.factor" if self.model.rope_scaling is not None else ""
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is larger than model.max_position_embeddings{scaled} "
                f"{self.model.reach}: lower the former or raise the latter"
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
