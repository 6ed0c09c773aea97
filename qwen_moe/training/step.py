"""One optimizer step over a global batch. Every loss term is a sum, and every reduction is a sum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from parallel.collectives import all_reduce_max, all_reduce_sum, attach_loss
from parallel.data import clip_by_norm, exchange_and_add, global_norm, local, sum_replicas
from parallel.pipeline import Pipeline, Sequential
from parallel.sequence import Batch, SequenceShard
from qwen_moe.config import RunConfig
from qwen_moe.data.replay import check_experts
from qwen_moe.errors import UserError
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import Router, RouterStatistics
from qwen_moe.objectives.balance import Balancer, update_expert_bias
from qwen_moe.objectives.base import Objective
from qwen_moe.objectives.build import build_objective
from qwen_moe.sharding.build import build_engine
from qwen_moe.sharding.layout import RunLayout
from qwen_moe.sharding.model import ParallelModel, TrainingPart
from qwen_moe.training.optimizer import set_learning_rate
from qwen_moe.training.schedule import learning_rate


class BadStep(UserError):
    """A loss or gradient norm is NaN or infinite, or a loss is above the limit. The optimizer has not been stepped."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one step over the whole global batch, equal on every rank."""

    loss: float  # the objective's sum divided by count
    metrics: dict[str, float]  # the objective's; in MoE models also balance_loss and z_loss, before their coefficients
    grad_norm: float  # before clipping
    learning_rate: float
    count: int  # what the objective divides by: valid tokens, pairs
    expert_counts: torch.Tensor | None  # [L, E] int64
    dropped_choices: int  # assignments of tokens to experts beyond capacity, over all layers


class Trainer:
    """The model, its optimizer and everything else that a step needs.

    ``objective``: by default the recipe's. ``on_gradients`` is called when all gradients are final, before clipping.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        objective: Objective | None = None,
        on_gradients: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.layout, self.model, self.optimizer, self.device = config, layout, model, optimizer, device
        self.grids, self.on_gradients = model.grids, on_gradients
        self.sequence = SequenceShard.of(model.grids)
        self.objective = objective or build_objective(config.objective)
        model.use_head(self.objective.head)
        self.engine = build_engine(config, layout, model, self._loss, device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._counted = [
            p
            for part, stage in zip(model.parts, model.stages, strict=True)
            for name, p in part.named_parameters()
            if model.counts_in_norm(name, stage)
        ]
        self._count = self._tokens = 1
        self._auxiliary: list[torch.Tensor] = []  # (balance, z) of each stage module and micro-batch
        self._metrics: list[torch.Tensor] = []  # the objective's metrics of each micro-batch
        self._maxima: list[torch.Tensor] = []  # and its maxima
        self._balancers: dict[int, Balancer] = {}
        if config.model.is_moe_family:
            experts, top_k = config.model.num_experts, config.model.num_experts_per_tok
            for part in model.parts:
                part.attach = self._attach
                self._balancers[id(part)] = Balancer(config.balance, experts, top_k, self.sequence, self.grids.stage)

    def routers(self) -> list[tuple[int, Router]]:
        """(index among all MoE layers, router) of each MoE layer on this rank."""
        places = {layer: place for place, layer in enumerate(self.config.model.moe_layers)}
        return [
            (places[layer.self_attn.layer], layer.mlp.gate)
            for part in self.model.parts
            for layer in part.model.layers
            if isinstance(layer.mlp, MoE)
        ]

    def step(self, step: int, micro_batches: Sequence[Batch], highest_loss: float = float("inf")) -> StepResult:
        """Run forward, backward and update of optimizer step ``step`` (from 0) on this data-parallel rank's micro-batches.
        Raises BadStep on every rank if the loss is not finite or is above ``highest_loss``."""
        config = self.config
        # After its end the learning rate is zero, and a comparison of updates would compare nothing.
        assert step < config.end_step, f"step {step} of a run of {config.end_step}"
        count = self._count_over_ranks(micro_batches)
        if count == 0 and self.objective.may_be_empty:
            return self._without_update(step)
        if count == 0:
            raise UserError(f"step {step}: the global batch has no valid label; check the data's labels")
        sums = self.forward_backward(micro_batches, count)
        if self.on_gradients is not None:
            self.on_gradients()
        norm = float(global_norm(self._counted, self.grids.world, self.device))
        sums = all_reduce_sum(sums, self.grids.world)
        loss, balance_loss, z_loss, *named = figures = sums.tolist()
        if not all(map(math.isfinite, (norm, *figures))):
            raise BadStep(
                f"step {step}: loss is {loss}, gradient norm {norm}; the weights were not updated. Lower "
                "optimizer.learning_rate, lengthen schedule.warmup_tokens or look at the data of this step; the newest "
                "checkpoint, if there is one, is from before it"
            )
        if loss > highest_loss:
            raise BadStep(
                f"step {step}: loss {loss:.4f} is a spike, above {highest_loss:.4f} (the median of recent losses plus "
                "training.spike_nats); the weights were not updated"
            )
        if config.optimizer.clip_grad_norm:
            clip_by_norm(self.parameters, norm, config.optimizer.clip_grad_norm)
        rate = learning_rate(config, step)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        counts, dropped = self._end_of_step_balance()
        metrics = dict(zip(self.objective.metrics, named, strict=True)) | self._largest()
        if config.model.is_moe_family:
            layers = max(1, len(config.model.moe_layers))
            metrics["balance_loss"] = balance_loss / (1 if config.balance.scope == "huggingface" else layers)
            metrics["z_loss"] = z_loss / layers
        return StepResult(
            loss=loss,
            metrics=metrics,
            grad_norm=norm,
            learning_rate=rate,
            count=count,
            expert_counts=counts,
            dropped_choices=dropped,
        )

    def _without_update(self, step: int) -> StepResult:
        """The result of a step that has nothing to learn from: nothing changes, not even AdamW's moments."""
        return StepResult(
            loss=0.0,
            metrics={},
            grad_norm=0.0,
            learning_rate=learning_rate(self.config, step),
            count=0,
            expert_counts=None,
            dropped_choices=0,
        )

    def abandon_step(self) -> None:
        """Discard the gradients and counts of a step that was not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        for balancer in self._balancers.values():
            if balancer.has_counts:
                balancer.end_step()

    def forward_backward(self, micro_batches: Sequence[Batch], count: int) -> torch.Tensor:
        """Compute the step's gradients, final on every rank. Returns this rank's share of the loss, the balance loss, the
        z-loss and the objective's metrics, ``[3 + metrics]`` float64. ``count``: the objective's, of the global batch."""
        self.begin_step(count, self._tokens_over_ranks(micro_batches))
        losses = self.engine.forward_backward([self.to_device(batch) for batch in micro_batches])
        sums = torch.zeros(3 + len(self.objective.metrics), dtype=torch.float64, device=self.device)
        for loss in losses:
            sums[0] += loss.double()
        for term in self._auxiliary:
            sums[1:3] += term
        for named in self._metrics:
            sums[3:] += named
        self.finalize_gradients()
        return sums

    def begin_step(self, count: int, tokens: int) -> None:
        """Prepare for micro-batches whose losses are divided by ``count``, and whose auxiliary losses by ``tokens``."""
        self._count, self._tokens, self._auxiliary, self._metrics, self._maxima = count, tokens, [], [], []
        self.model.kernels.begin_step()
        for part in self.model.parts:
            part.train()

    def _count_over_ranks(self, micro_batches: Sequence[Batch]) -> int:
        """The objective's count, summed over all ranks' micro-batches."""
        missing = [name for name in self.objective.fields if any(name not in batch for batch in micro_batches)]
        if missing:
            raise UserError(
                f"the data has no {', '.join(missing)}, which the objective reads: prepare data that has them"
            )
        for batch in micro_batches:
            check_experts(batch, self.config.model)
        counts = [self.objective.count(batch) for batch in micro_batches]
        return int(all_reduce_sum(torch.stack(counts).sum().to(self.device, non_blocking=True), self.grids.dp))

    def _tokens_over_ranks(self, micro_batches: Sequence[Batch]) -> int:
        """The tokens of the global batch without its padding."""
        if "counted" not in micro_batches[0]:
            return self.config.tokens_per_step
        counted = torch.stack([batch["counted"].sum() for batch in micro_batches]).sum()
        return int(all_reduce_sum(counted.to(self.device), self.grids.dp))

    def to_device(self, batch: Batch) -> Batch:
        """This rank's cp part of a micro-batch, on its device."""
        part = self.sequence.of_batch(batch)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()}

    def _loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A micro-batch's share of the mean loss, from the last stage's output."""
        loss, named = self.objective.loss(output, batch, self.sequence)
        if self.objective.metrics:
            values = [named[name].detach().double() for name in self.objective.metrics]
            self._metrics.append(torch.stack(values) / self._count)
        if self.objective.maxima:
            self._maxima.append(torch.stack([named[name].detach().double() for name in self.objective.maxima]))
        return loss / self._count

    def _largest(self) -> dict[str, float]:
        """The objective's maxima over all micro-batches and ranks."""
        names = self.objective.maxima
        if not names:
            return {}
        none = torch.full((len(names),), -torch.inf, dtype=torch.float64, device=self.device)  # without the last stage
        largest = torch.stack([none, *self._maxima]).amax(0)
        return dict(zip(names, all_reduce_max(largest, self.grids.world).tolist(), strict=True))

    def _attach(
        self,
        part: TrainingPart,
        out: torch.Tensor,
        router: RouterStatistics,
        labels: torch.Tensor,
        counted: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach auxiliary losses to the stage output; backward adds their gradient unscaled."""
        balance = self.config.balance
        tokens = self.sequence.tokens(labels) if counted is None else counted.sum(1)
        balance_loss, z_loss = self._balancers[id(part)].loss(router, tokens, self._tokens)
        self._auxiliary.append(torch.stack([balance_loss.detach().double(), z_loss.detach().double()]))
        loss = balance.z_loss_coefficient * z_loss
        if balance.scope != "none":
            loss = loss + balance.coefficient * balance_loss
        return attach_loss(out, loss)

    def finalize_gradients(self) -> None:
        """Sum gradients that are still partial, once per step: those of replicated parameters over the axis that splits
        their inputs, and those of tied embeddings over the two stages that hold them. Kernels reduce their amax here too."""
        self.model.kernels.end_step()
        placements = self.model.placements
        sum_replicas([(p, placements[name].replicas) for name, p in self.model.named_parameters()])
        if not self.model.tied_apart:
            return
        tied = {
            stage: part.model.embed_tokens.weight
            for part, stage in zip(self.model.parts, self.model.stages, strict=True)
            if part.first or part.last
        }
        gradients = [local(weight.grad) for weight in tied.values() if weight.grad is not None]
        assert len(gradients) == len(tied)
        if len(tied) == 2:
            total = gradients[0] + gradients[1]
            for gradient in gradients:
                gradient.copy_(total)
        elif tied:
            peer = self.grids.pp.size - 1 if 0 in tied else 0
            exchange_and_add(gradients[0], peer, self.grids.pp)

    def _end_of_step_balance(self) -> tuple[torch.Tensor | None, int]:
        config = self.config.model
        if not config.is_moe_family:
            return None, 0
        layers = len(config.moe_layers)
        # Every rank has counted its own tokens in its own layers, so one sum over all ranks covers the whole step.
        table = torch.zeros(layers, config.num_experts + 1, dtype=torch.int64, device=self.device)
        routers = self.routers()
        rows = [place for place, _ in routers]
        per_part = [b.end_step() for part in self.model.parts if (b := self._balancers[id(part)]).has_counts]
        if per_part:
            table[rows, :-1] = torch.cat([counts for counts, _ in per_part])
            table[rows, -1] = torch.cat([dropped for _, dropped in per_part])
        table = all_reduce_sum(table, self.grids.world)
        counts = table[:, :-1]
        if self.config.balance.bias_update_rate and routers:
            biases = [router.expert_bias for _, router in routers]
            update_expert_bias(biases, counts[rows], self.config.balance.bias_update_rate)
        return counts, int(table[:, -1].sum())

    def engine_for(self, sequence_length: int) -> Sequential | Pipeline:
        """The engine that evaluates micro-batches of another length: pipelines exchange tensors of one shape."""
        if self.grids.pp.size == 1 or sequence_length == self.config.data.sequence_length:
            return self.engine
        data = self.config.data.model_copy(update={"sequence_length": sequence_length})
        config = self.config.model_copy(update={"data": data})
        return build_engine(config, self.layout, self.model, self._loss, self.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], engine: Sequential | Pipeline | None = None) -> float:
        """The objective's mean over all ranks' micro-batches. Every rank must pass the same number of micro-batches, because
        forward passes communicate. ``engine``: of `engine_for`, by default the one that trains."""
        for part in self.model.parts:
            part.eval()
        count = self._count_over_ranks(micro_batches)
        if count == 0:
            raise UserError(
                f"the validation data have nothing that objective.kind {self.config.objective.kind} learns from, such as a "
                "judged pair: give others, or set training.validation_interval to 0"
            )
        batches = [self.to_device(batch) for batch in micro_batches]
        outputs = (engine or self.engine).forward(batches)
        self.model.reshard()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for output, batch in zip(outputs, batches, strict=False):  # only the last stage's rank has outputs
            total += self.objective.loss(output, batch, self.sequence)[0].double()
        return float(all_reduce_sum(total, self.grids.world)) / count
