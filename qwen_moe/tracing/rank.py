"""Builds one rank of a layout on fake tensors and runs one training step of it, counted."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from launchers.counted import counted
from parallel.mesh import Axis, Grids
from parallel.sequence import SequenceShard
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.models.moe.block import MoE, Sent
from qwen_moe.models.moe.dispatch import Route
from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.models.ops.grouped_matmul import ONE_KERNEL
from qwen_moe.objectives.build import build_objective
from qwen_moe.progress import bar
from qwen_moe.sharding.aligned import check_aligned
from qwen_moe.sharding.build import make_grids, shard_model
from qwen_moe.sharding.layout import RunLayout, run_layout
from qwen_moe.sharding.model import ParallelModel
from qwen_moe.tracing.count import DEVICE, HOST, Counter, Place
from qwen_moe.training.optimizer import build_optimizer
from qwen_moe.training.step import Trainer

OUTSIDE = "outside layers"  # RoPE's tables, final norm, head and loss
_LAYER = re.compile(r"model\.layers\.(\d+)(?:\.(self_attn|mlp)\b.*|\..*)?")


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One counted step of rank ``rank``."""

    config: RunConfig
    layout: RunLayout
    rank: int
    layers: list[int]  # of this rank
    counter: Counter


def trace_step(config: RunConfig, gpus: int, rank: int = 0) -> StepTrace:
    """Run one step of rank ``rank`` of ``gpus`` processes. The process must not have a process group. Raises UserError for
    a layout that is not legal and for objectives that read more than token ids and labels."""
    layout = run_layout(config, gpus)
    if not 0 <= rank < gpus:
        raise UserError(f"--rank {rank} is none of the {counted(gpus, 'rank')}: give 0 to {gpus - 1}")
    check_objective(config)
    if config.precision.compute == "bf16":  # other precisions are counted as one GEMM of all rows
        check_aligned(config.model, config.parallel.etp)
    dist.init_process_group("fake", rank=rank, world_size=gpus, store=FakeStore())
    try:
        with _fsdp_on(DEVICE):
            grids = make_grids(config, layout, HOST)
            model = shard_model(config, layout, grids)
            return _step(config, layout, rank, model)
    finally:
        dist.destroy_process_group()


def check_objective(config: RunConfig) -> None:
    """Raises UserError for objectives whose batches a trace cannot make."""
    if fields := build_objective(config.objective).fields:
        raise UserError(
            f"objective.kind {config.objective.kind} reads {', '.join(fields)} from its batches, and a trace makes only "
            "token ids and labels: trace objective.kind=likelihood, whose layers are the same"
        )


@contextmanager
def _fsdp_on(device: torch.device) -> Iterator[None]:
    """FSDP2 allocates on the device of its mesh, which has a type but no number."""
    with mock.patch("torch.distributed.fsdp._fully_shard._fully_shard._get_device_from_mesh", lambda mesh: device):
        yield


def _step(config: RunConfig, layout: RunLayout, rank: int, model: ParallelModel) -> StepTrace:
    training, sequence = config.training, config.data.sequence_length
    held = training.micro_batch_size * SequenceShard.of(model.grids).length(sequence)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in model.parts:
            part.to_empty(device=DEVICE)
            keep_statistics_dtypes(part)
        model.kernels.materialize(DEVICE)
        _use_grouped_kernel(config, model)
        optimizer = build_optimizer(model, config.optimizer)
        trainer = Trainer(config, layout, model, optimizer, DEVICE)
        ids = torch.zeros(training.micro_batch_size, sequence, dtype=torch.int64, device=HOST)
        places = _places(config, model)
        counter = Counter(
            places,
            _axes(model.grids),
            number=max(1.0, config.optimizer.clip_grad_norm) + 1,
            wide=_wide(config, layout, held),
        )
        optimizer.register_step_pre_hook(lambda *_: setattr(counter, "outside", "optimizer"))
        optimizer.register_step_post_hook(lambda *_: setattr(counter, "outside", "rest of the step"))
        with counter, _booked(counter, places):
            # The first step also sets up messages between stages and the optimizer's state.
            for _ in bar(range(2), "tracing", "step"):
                counter.reset()
                trainer.step(0, [{"input_ids": ids, "labels": ids} for _ in range(layout.micro_batches)])
        counter.finish()
    layers = [layer for stage in model.stages for layer in layout.layers[stage]]
    return StepTrace(config=config, layout=layout, rank=rank, layers=layers, counter=counter)


def _wide(config: RunConfig, layout: RunLayout, tokens: int) -> int:
    """Elements of an index over all experts of the ``tokens`` that a rank routes. With etp a rank computes its peers' rows
    too, and indices of these rows, which may be as many, are no such index."""
    model = config.model
    return max(tokens * max(1, model.num_experts), tokens * model.num_experts_per_tok * layout.layout.etp + 1)


def _use_grouped_kernel(config: RunConfig, model: ParallelModel) -> None:
    """Let experts call the grouped GEMM that a GPU runs. Torch knows its shapes for bfloat16 only."""
    if config.precision.compute != "bf16":
        return
    for module in model.modules():
        if isinstance(module, Experts):
            module.kernel = ONE_KERNEL


def _places(config: RunConfig, model: ParallelModel) -> dict[nn.Module, Place]:
    found: dict[nn.Module, Place] = {}
    for part in model.parts:
        for name, module in part.named_modules():
            match = _LAYER.fullmatch(name)
            if match is None:
                found[module] = Place(-1, "embedding" if "embed_tokens" in name else OUTSIDE)
                continue
            layer = int(match[1])
            moe = "experts" if config.model.is_moe_layer(layer) else "feed-forward"
            kind = {"self_attn": "attention", "mlp": moe}.get(match[2] or "", "norms, sums, FSDP2")
            found[module] = Place(layer, kind)
    return found


@contextmanager
def _booked(counter: Counter, places: dict[nn.Module, Place]) -> Iterator[None]:
    """Book the steps of a MoE block under it. With ``parallel.ep_overlap`` a layer calls them one by one, and the last after
    the next layer has begun."""
    of_route: dict[int, tuple[Route, Place]] = {}  # a route is kept, so that no other gets its number
    received = Sent.received

    def send(moe: MoE, place: Place) -> Callable[..., tuple[Sent, RouterStatistics]]:
        def call(*args: Any) -> tuple[Sent, RouterStatistics]:
            with counter.within(place):
                sent, statistics = MoE.send(moe, *args)
            of_route[id(sent.route)] = sent.route, place
            return sent, statistics

        return call

    def through_experts(moe: MoE, place: Place) -> Callable[[Sequence[Sent]], list[Sent]]:
        def call(parts: Sequence[Sent]) -> list[Sent]:
            with counter.within(place):
                return MoE.through_experts(moe, parts)

        return call

    def receive(sent: Sent, like: torch.Tensor) -> torch.Tensor:
        _, place = of_route.pop(id(sent.route))
        with counter.within(place):
            return received(sent, like)

    blocks = [(module, place) for module, place in places.items() if isinstance(module, MoE)]
    with ExitStack() as patches:
        for moe, place in blocks:
            patches.enter_context(mock.patch.object(moe, "send", send(moe, place)))
            patches.enter_context(mock.patch.object(moe, "through_experts", through_experts(moe, place)))
        patches.enter_context(mock.patch.object(Sent, "received", receive))
        yield


def _axes(grids: Grids) -> dict[str, set[str]]:
    """The axes of each process group. Tokens travel among ep x etp ranks, which is ep without etp."""
    renamed = {"exchange": "ep" if grids.etp.size == 1 else "ep x etp"}
    world = dist.group.WORLD
    assert world is not None
    found: dict[str, set[str]] = {world.group_name: {"world"}}
    for axis in vars(grids).values():
        if isinstance(axis, Axis) and axis.group is not None:
            found.setdefault(axis.group.group_name, set()).add(renamed.get(axis.name, axis.name))
    return found
