"""One rank of a verified run: trains a few steps in a layout and reports its piece of every tensor."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from parallel.data import local
from qwen_moe.config import RunConfig
from qwen_moe.data.samples import rank_samples
from qwen_moe.objectives.base import Objective
from qwen_moe.sharding.build import build_model, make_grids
from qwen_moe.sharding.layout import run_layout
from qwen_moe.sharding.model import ParallelModel
from qwen_moe.training.optimizer import build_optimizer
from qwen_moe.training.step import Trainer
from qwen_moe.verify.case import drawn_value, global_batch
from qwen_moe.verify.probe import Probe


@dataclass
class Report:
    """One rank's results. Pieces are (name, offsets in the whole, values)."""

    figures: list[dict[str, float]] = field(default_factory=list)
    counts: list[Any] = field(default_factory=list)
    gradients: list[list[tuple[str, list[int], torch.Tensor]]] = field(default_factory=list)
    parameters: list[tuple[str, list[int], torch.Tensor]] = field(default_factory=list)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    evaluated: float = 0.0  # the loss of another batch after the last step


def _pieces(model: ParallelModel, of_gradients: bool) -> list[tuple[str, list[int], torch.Tensor]]:
    pieces = []
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if of_gradients else parameter
        if tensor is not None:
            pieces.append((name, model.range_of(name, parameter)[0], local(tensor).detach().clone()))
    return pieces


@torch.no_grad()
def _draw(model: ParallelModel, seed: int) -> None:
    """Give this rank's part of norms, biases and expert biases random values (`drawn_value`)."""
    for name, parameter in model.named_parameters():
        value = drawn_value(name, model.placements[name].shape, seed)
        if value is not None and (held := local(parameter)).numel():
            for dim, (offset, size) in enumerate(zip(*model.range_of(name, parameter), strict=True)):
                value = value.narrow(dim, offset, size)
            held.copy_(value)
    for name, buffer in model.named_buffers():
        if (value := drawn_value(name, buffer.shape, seed)) is not None:
            buffer.copy_(value)


def make_trainer(config: RunConfig, objective: Objective | None = None) -> Trainer:
    """This rank's trainer; of a run in float64, with norms and biases drawn too (`drawn_value`). The process group must be
    initialized."""
    device = torch.device("cpu")
    layout = run_layout(config, dist.get_world_size())
    grids = make_grids(config, layout, device)
    model = build_model(config, layout, grids, device)
    if config.precision.compute == "fp64":
        _draw(model, config.seed)
    return Trainer(config, layout, model, build_optimizer(model, config.optimizer), device, objective)


def micro_batches(trainer: Trainer, step: int) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's share of `global_batch`."""
    training, dp = trainer.config.training, trainer.grids.dp
    batch = global_batch(trainer.config, step)
    ranges = rank_samples(0, training.global_batch_size, training.micro_batch_size, dp.index, dp.size)
    return [{name: tensor[first : first + count] for name, tensor in batch.items()} for first, count in ranges]


def train_rank(config: RunConfig, steps: int | None = None, probe: bool = False) -> Report:
    """Train ``steps`` steps (None: all) of the case ``config`` in its layout. Every rank of an initialized process group
    must call it. ``probe``: minimize the probe instead of the recipe's objective."""
    trainer, report = make_trainer(config, Probe() if probe else None), Report()
    trainer.on_gradients = lambda: report.gradients.append(_pieces(trainer.model, True))
    steps = config.train_steps if steps is None else steps
    for step in range(steps):
        record_step(trainer, report, step)
    record_end(trainer, report, steps)
    return report


def record_end(trainer: Trainer, report: Report, step: int) -> None:
    """Add what a run ends with to ``report``, and the loss of the batch that ``step`` would be."""
    report.parameters = _pieces(trainer.model, False)
    report.biases = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    report.evaluated = trainer.evaluate(micro_batches(trainer, step))


def record_step(trainer: Trainer, report: Report, step: int) -> None:
    """Run one step and append its figures to ``report``."""
    result = trainer.step(step, micro_batches(trainer, step))
    report.figures.append(
        {
            "loss": result.loss,
            "balance loss": result.metrics.get("balance_loss", 0.0),
            "z-loss": result.metrics.get("z_loss", 0.0),
            "gradient norm": result.grad_norm,
        }
        | {name: result.metrics[name] for name in (*trainer.objective.metrics, *trainer.objective.maxima)}
    )
    counts = None if result.expert_counts is None else result.expert_counts.tolist()
    report.counts.append((counts, result.dropped_choices))
