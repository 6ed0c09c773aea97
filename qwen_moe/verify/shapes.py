"""Builds any rank of a layout of any size and runs one step of it on shapes alone, without memory or other processes.

PyTorch's fake process group completes every collective at once, and fake tensors have shapes but no data. This checks that
every stage module can be built, that the shapes of collectives and matmuls fit, and that every parameter gets a gradient.
Routing is assumed to be perfectly balanced. Each stage runs alone: hidden states are not sent between stages.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.data import local
from parallel.pipeline import Sequential
from parallel.sequence import SequenceShard
from qwen_moe.checkpoint.optimizer_state import optimizer_state
from qwen_moe.config import RunConfig
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.sharding.build import DTYPES, make_grids, shard_model
from qwen_moe.sharding.layout import run_layout
from qwen_moe.training.optimizer import build_optimizer
from qwen_moe.training.step import Trainer


@dataclass(frozen=True, kw_only=True)
class ShapeReport:
    """One rank's elements of parameters, gradients and optimizer moments, and the layers of its stages."""

    rank: int
    layout: str
    layers: list[list[int]]
    parameters: int
    gradients: int
    optimizer: int
    seconds: float


def run_shapes(config: RunConfig, world_size: int, rank: int) -> ShapeReport:
    """Build rank ``rank`` of ``world_size`` and run one step of two micro-batches. The process must not have a process
    group. Raises UserError for an illegal layout; a shape that does not fit raises torch's own error."""
    begin = time.monotonic()
    layout = run_layout(config, world_size)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        device = torch.device("cpu")
        grids = make_grids(config, layout, device)
        model = shard_model(config, layout, grids)
        training, sequence = config.training, config.data.sequence_length
        rows = training.micro_batch_size
        with FakeTensorMode(allow_non_fake_inputs=True):
            for part in model.parts:
                part.to_empty(device=device)
                keep_statistics_dtypes(part)
            model.kernels.materialize(device)
            trainer = Trainer(config, layout, model, build_optimizer(model, config.optimizer), device)
            trainer.begin_step(count=rows * sequence, tokens=rows * sequence)
            ids = torch.zeros(rows, sequence // grids.cp.size, dtype=torch.int64)
            hidden_shape = (rows, SequenceShard.of(grids).length(sequence), config.model.hidden_size)
            for part in model.parts:
                engine = Sequential(part, lambda out, batch: out.sum())
                hidden = torch.zeros(hidden_shape, dtype=DTYPES[config.precision.compute], requires_grad=True)
                engine.forward_backward([{"input_ids": ids if part.first else hidden, "labels": ids}] * 2)
                if not part.first:
                    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
            trainer.finalize_gradients()
            gradients = 0
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                assert local(parameter.grad).shape == local(parameter).shape, name
                gradients += local(parameter.grad).numel()
            trainer.optimizer.step()
            moments = optimizer_state(model, trainer.optimizer)
        return ShapeReport(
            rank=rank,
            layout=str(layout.layout),
            layers=[list(layout.layers[stage]) for stage in model.stages],
            parameters=sum(local(p).numel() for p in model.parameters()),
            gradients=gradients,
            optimizer=sum(local(tensor).numel() for held in moments.values() for tensor in held.values()),
            seconds=time.monotonic() - begin,
        )
    finally:
        dist.destroy_process_group()
