"""One optimizer step over a global batch: every loss term a sum, every reduction a sum (DESIGN, decision 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from parallel.data import all_reduce_sum, clip_by_norm, global_norm
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.linear_cross_entropy import IGNORE
from qwen_moe.models.router import Router
from qwen_moe.training.balance import Balancer, update_expert_bias
from qwen_moe.training.optimizer import set_learning_rate
from qwen_moe.training.schedule import learning_rate

Batch = dict[str, torch.Tensor]


class NonFiniteLoss(UserError):
    """A loss or gradient norm that is NaN or infinite; the optimizer has not been stepped."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Figures of one step over the whole global batch, equal on every rank."""

    loss: float  # mean cross-entropy per counted token, nats
    balance_loss: float  # before its coefficient, mean over MoE layers
    z_loss: float  # before its coefficient, mean over MoE layers
    grad_norm: float  # before clipping
    learning_rate: float
    loss_tokens: int
    expert_counts: torch.Tensor | None  # [L, E] int64


@dataclass
class Trainer:
    """The model, its optimizer and what a step needs beside them."""

    config: RunConfig
    model: Any  # a DecoderLM that `shard` has also made an FSDPModule
    optimizer: torch.optim.Optimizer
    mesh: DeviceMesh
    device: torch.device

    def __post_init__(self) -> None:
        model = self.config.model
        self.balancer = (
            Balancer(self.config.balance, model.num_experts, model.num_experts_per_tok, self.mesh)
            if model.is_moe_family
            else None
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def expert_biases(self) -> list[torch.Tensor]:
        """The selection bias of each MoE layer, in order of depth."""
        return [module.expert_bias for module in self.model.modules() if isinstance(module, Router)]

    def step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Forward, backward and update of optimizer step ``step`` (from 0) on this rank's micro-batches."""
        config = self.config
        global_tokens = config.tokens_per_step
        counted = torch.stack([(batch["labels"] != IGNORE).sum() for batch in micro_batches]).sum()
        loss_tokens = int(all_reduce_sum(counted.to(self.device), self.mesh))
        if loss_tokens == 0:
            raise UserError(f"step {step}: no token of the global batch counts in the loss; check the data's labels")
        self.model.train()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            self.model.set_requires_gradient_sync(index == len(micro_batches) - 1)
            sums += self._micro_batch(batch, loss_tokens, global_tokens)
        sums = all_reduce_sum(sums, self.mesh)
        norm = float(global_norm(self.parameters, self.mesh))
        loss, balance_loss, z_loss = sums.tolist()
        if not torch.isfinite(sums).all() or norm != norm or norm == float("inf"):
            raise NonFiniteLoss(
                f"step {step}: loss is {loss}, gradient norm {norm}; the weights were not updated. Lower "
                "optimizer.learning_rate, lengthen schedule.warmup_tokens or look at the data of this step; a "
                "checkpoint, if one was written, is from before it"
            )
        if config.optimizer.clip_grad_norm:
            clip_by_norm(self.parameters, norm, config.optimizer.clip_grad_norm)
        rate = learning_rate(config, step)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        counts = self._end_of_step_balance()
        layers = max(1, len(config.model.moe_layers))
        return StepResult(
            loss=loss,
            balance_loss=balance_loss if config.balance.scope == "huggingface" else balance_loss / layers,
            z_loss=z_loss / layers,
            grad_norm=norm,
            learning_rate=rate,
            loss_tokens=loss_tokens,
            expert_counts=counts,
        )

    def _micro_batch(self, batch: Batch, loss_tokens: int, global_tokens: int) -> torch.Tensor:
        """Backward of one micro-batch; its (cross-entropy, balance, z) shares of the step's losses, [3] float64."""
        config = self.config
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        sums = self.model.loss_sums(**batch, chunk_tokens=config.training.loss_chunk_tokens)
        cross_entropy = sums.cross_entropy / loss_tokens
        objective = cross_entropy
        balance_loss = z_loss = torch.zeros((), device=self.device)
        if self.balancer is not None and sums.router is not None:
            balance_loss, z_loss = self.balancer.loss(sums.router, batch["labels"].numel(), global_tokens)
            if config.balance.scope != "none":
                objective = objective + config.balance.coefficient * balance_loss
            objective = objective + config.balance.z_loss_coefficient * z_loss
        objective.backward()
        return torch.stack([term.detach().double() for term in (cross_entropy, balance_loss, z_loss)])

    def _end_of_step_balance(self) -> torch.Tensor | None:
        if self.balancer is None:
            return None
        counts = self.balancer.end_step()
        if self.config.balance.bias_update_rate:
            update_expert_bias(self.expert_biases(), counts, self.config.balance.bias_update_rate)
        return counts

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> float:
        """Mean cross-entropy per counted token over all ranks' micro-batches, nats. Every rank gives the same number
        of micro-batches (their forward passes communicate)."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            part = self.model.loss_sums(**batch, chunk_tokens=self.config.training.loss_chunk_tokens)
            sums += torch.stack([part.cross_entropy.double(), part.tokens.double()])
        total, tokens = all_reduce_sum(sums, self.mesh).tolist()
        return total / tokens
