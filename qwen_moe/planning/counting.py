"""Runs parts of a model on shapes alone and records the tensors that stay alive for backward.

There is thus no formula of what a module saves that could become outdated.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.kernels.interface import Kernels
from parallel.mesh import Grids, Layout
from parallel.pipeline import between_halves
from qwen_moe.config import ModelConfig, RunConfig
from qwen_moe.models.attention.core import Attend, attend
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.decoder import Layers
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.models.moe.block import MoE
from qwen_moe.objectives.build import build_objective
from qwen_moe.planning.live_bytes import LiveBytes, storages
from qwen_moe.planning.tape import NOTHING, Bytes, Front, Scale, Tape, plus
from qwen_moe.sharding.build import DTYPES
from qwen_moe.sharding.context import ContextAttention
from qwen_moe.sharding.kernels import choose_kernels
from qwen_moe.sharding.layout import ContextPlan
from qwen_moe.sharding.model import TrainingPart, build_parts

_TURNS = 3  # of a ring: more turns hold no more


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes of one micro-batch: ``held`` from forward to backward, up to ``working`` more within either of them, and
    ``between`` more between the halves of a backward."""

    held: float
    working: float
    between: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Split:
    """How ranks share a layer. ``context`` matters only with cp above 1."""

    tp: int = 1
    cp: int = 1
    context: ContextPlan = field(default_factory=ContextPlan)
    ep: int = 1
    etp: int = 1

    def attention(self) -> "Split":
        """A split with the same memory for attention, of as few ranks as possible."""
        if self.cp == 1:
            return Split(tp=self.tp)
        outer, heads = self.cp // self.context.heads, self.context.heads
        if self.context.kind == "ring" and outer > _TURNS:
            outer = _TURNS
        return Split(tp=self.tp, cp=outer * heads, context=self.context)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to count: a stage module with ``layers``, whose ranks are given ``given`` tokens of each sequence (S / cp). With
    ``middle`` only the kinds of the layers matter, and there is neither embedding nor head. With ``forward_only``,
    ``working`` is not measured. ``without_layers``: only the embedding and the head of the stage."""

    split: Split = field(default_factory=Split)
    given: int
    layers: tuple[int, ...]
    micro_batch: int = 1
    middle: bool = False
    recompute: bool = False
    precision: str = "bf16"
    forward_only: bool = False
    without_layers: bool = False


@contextmanager
def fake_grids(layout: Layout, kv_heads: int, rank: int = 0, cp_heads: int = 1) -> Iterator[Grids]:
    """The grids of a layout of any size, in this process alone: every collective returns at once. The process must not
    have a process group."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield Grids(layout, "cpu", kv_heads=kv_heads, cp_heads=cp_heads)
    finally:
        dist.destroy_process_group()


def count(config: RunConfig, run: Run) -> Saved:
    """Run a stage module forward and backward on fake tensors of its own sizes. Parameters, their gradients and the input
    are not counted; the output is."""
    with _stage(config, run) as (part, x, ids), LiveBytes(peaks=not run.forward_only) as live:
        out = part(x, ids)
        held = live.live
        if run.forward_only:
            return Saved(held=held, working=0)
        kept = _KeptGradients(part, x, out)
        torch.autograd.backward(out, torch.ones_like(out))
        return Saved(held=held, working=max(0, live.peak - held), between=sum(kept.sizes))


class _KeptGradients:
    """``sizes``: bytes of the gradients that a backward in two halves keeps between them, noted during one backward from
    ``out`` to ``x``. All that forward has kept stays, too. A stage that begins with token ids has its whole backward in the
    second half."""

    def __init__(self, part: TrainingPart, x: torch.Tensor, out: torch.Tensor) -> None:
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}  # weak references keep an address from being used again
        for node in between_halves(out, x, part.parameters()) if x.requires_grad else ():
            node.register_prehook(self._note)

    def _note(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        for storage in storages(tuple(one for one in gradients if one is not None)):
            self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    @property
    def sizes(self) -> list[int]:
        return [size for _, size in self._found.values()]


@contextmanager
def _stage(
    config: RunConfig, run: Run, core: Attend | None = None
) -> Iterator[tuple[TrainingPart, torch.Tensor, torch.Tensor]]:
    """(the stage module of ``run``, its input, labels) on fake tensors. ``core``: of attention, instead of the run's."""
    split, dtype = run.split, DTYPES[run.precision]
    ranks = split.tp * split.cp
    dp = math.lcm(ranks, split.ep * split.etp) // ranks
    layout = Layout(dp=dp, cp=split.cp, tp=split.tp, ep=split.ep, etp=split.etp)
    with fake_grids(layout, config.model.num_key_value_heads, cp_heads=split.context.heads) as grids:
        part, kernels = _build(config, run, grids)
        if core is not None:
            for module in part.modules():
                if isinstance(module, Attention):
                    module.attend = core
        with FakeTensorMode(allow_non_fake_inputs=True):
            part.to_empty(device="cpu")
            keep_statistics_dtypes(part)
            kernels.materialize(torch.device("cpu"))
            for parameter in part.parameters():
                parameter.grad = torch.zeros_like(parameter)
            ids = torch.zeros(run.micro_batch, run.given, dtype=torch.int64)
            shape = (run.micro_batch, run.given // split.tp, config.model.hidden_size)
            hidden = torch.zeros(shape, dtype=dtype, requires_grad=True)
            yield part, ids if part.first else hidden, ids


def _build(config: RunConfig, run: Run, grids: Grids) -> tuple[TrainingPart, Kernels]:
    """The stage module of ``run`` on the meta device, and its kernels."""
    model, layers = config.model, run.layers
    precision = config.precision.model_copy(update={"compute": run.precision, "kernels": "auto"})
    if run.middle:
        # Put layers of these kinds into the middle of a model that is two layers longer.
        kinds = [model.is_moe_layer(layer) for layer in layers]
        dense = tuple(index + 1 for index, moe in enumerate(kinds) if not moe)
        changes = {"num_hidden_layers": len(layers) + 2, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        model, layers = model.model_copy(update=changes), tuple(range(1, len(layers) + 1))
    built = build_parts(
        model,
        grids,
        [layers],
        [0],
        recompute="full" if run.recompute else "none",
        dtype=DTYPES[run.precision],
        kernels=choose_kernels(config.model_copy(update={"precision": precision}), grids),
    )
    built.use_head(build_objective(config.objective).head)
    (part,) = built.parts
    if run.without_layers:
        part.model.layers = Layers(model, ())
    part.chunk_tokens = config.training.loss_chunk_tokens
    for module in part.modules():
        if isinstance(module, MoE):
            module.capacity_factor = config.balance.capacity_factor
        elif isinstance(module, Attention) and grids.cp.size > 1:
            module.attend = ContextAttention(run.split.context.kind, grids.cp_outer, grids.cp_heads)
    return part, built.kernels


@dataclass(frozen=True, kw_only=True)
class Body:
    """What a stage module holds besides what its attention cores do, and what it holds more ``between`` the halves of a
    backward. ``fronts``: of the stretches before the core's forward, between it and the core's backward, and after that; by
    which of q, k, v and the output are dead, and after that by which gradients of q, k and v are. ``forward`` and
    ``backward``: what is alive, and what of these is dead, when the core begins either."""

    scale: Scale
    held: Bytes
    between: Bytes
    dead: tuple[bool, ...]
    qkvy: tuple[Bytes, ...]
    forward: Bytes
    backward: Bytes
    dead_in_backward: tuple[bool, ...]
    fronts: tuple[dict[tuple[bool, ...], Front], ...]


@dataclass(frozen=True, kw_only=True)
class Core:
    """What an attention core holds from forward to backward: ``kept`` of q, k, v and its output, and ``held`` besides.
    ``joined``: for the gradients of q, k and v, a number that those in one storage share. ``forward``, ``backward``: the
    fronts of both, of which `begin` was alive before."""

    scale: Scale
    kept: tuple[bool, ...]
    joined: tuple[int, ...]
    held: Bytes
    forward: Front
    forward_begin: Bytes
    backward: Front
    backward_begin: Bytes


class _Hole(torch.autograd.Function):
    """In place of an attention core: has its shapes and keeps nothing."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tape: Tape) -> torch.Tensor:
        tape.mark("core")
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tape.watch(q, k, v, y)
        tape.mark("between")
        ctx.tape, ctx.shapes = tape, (q.shape, k.shape, v.shape)
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        ctx.tape.mark("core's backward")
        gradients = [grad_outputs[0].new_empty(shape) for shape in ctx.shapes]
        ctx.tape.watch(*gradients)
        ctx.tape.mark("after")
        return *gradients, None


class _Source(torch.autograd.Function):
    """q, k and v, which nothing else holds."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, shapes: tuple[tuple[int, ...], ...], tape: Tape) -> tuple[torch.Tensor, ...]:
        ctx.tape = tape
        return tuple(x.new_empty(shape) for shape in shapes)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        ctx.tape.mark("end")
        ctx.tape.watch(*grad_outputs)
        return grad_outputs[0].new_zeros(()), None, None


class _Sink(torch.autograd.Function):
    """Takes the core's output; backward makes its gradient."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, tape: Tape) -> torch.Tensor:
        ctx.tape, ctx.shape = tape, y.shape
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        dy = grad_outputs[0].new_empty(ctx.shape)
        ctx.tape.mark("backward")
        return dy, None


def record_body(config: RunConfig, run: Run, scale: Scale) -> Body:
    """Record a stage module of one layer, or forward of one of several, whose attention has no core."""
    tape = Tape(scale, peaks=not run.forward_only)
    with _stage(config, run, lambda q, k, v, visible, scale: _Hole.apply(q, k, v, tape)) as (part, x, ids), tape:
        out = part(x, ids)
        held, dead, qkvy = tape.now, tape.dead(), tuple(size for _, size in tape.watched)
        between = NOTHING
        if not run.forward_only:
            kept = _KeptGradients(part, x, out)
            torch.autograd.backward(out, torch.ones_like(out))
            between = reduce(plus, map(scale.split, kept.sizes), NOTHING)
    nothing = ("", held, dead)
    marks = {mark[0]: mark for mark in tape.marks}
    _, backward, dead_in_backward = marks.get("core's backward", nothing)
    return Body(
        scale=scale,
        held=held,
        between=between,
        dead=dead,
        qkvy=qkvy,
        forward=marks["core"][1],
        backward=backward,
        dead_in_backward=dead_in_backward,
        fronts=tuple(tape.stretches.get(name, {}) for name in ("begin", "between", "after")),
    )


def record_core(model: ModelConfig, run: Run, scale: Scale) -> Core:
    """Record the attention core of ``run`` alone, with the heads that a rank of its tp has."""
    split, batch = run.split, run.micro_batch
    heads, groups = model.num_attention_heads // split.tp, max(1, model.num_key_value_heads // split.tp)
    shapes = tuple((batch, run.given, count, model.head_dim) for count in (heads, groups, groups))
    tape = Tape(scale)
    with fake_grids(Layout(cp=split.cp), model.num_key_value_heads, cp_heads=split.context.heads) as grids:
        core: Attend = attend
        if split.cp > 1:
            core = ContextAttention(split.context.kind, grids.cp_outer, grids.cp_heads)
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.zeros((), dtype=DTYPES[run.precision], requires_grad=True)
            with tape:
                q, k, v = _Source.apply(x, shapes, tape)
                tape.mark("forward")
                y = core(q, k, v, Visibility(), 1.0)
                tape.watch(q, k, v, y)
                out = _Sink.apply(y, tape)
                del q, k, v, y
                held, kept = plus(tape.now, scale.split(out.nbytes), -1), tuple(not dead for dead in tape.dead())
                tape.mark("kept")
                for (_, size), alive in zip(tape.watched, kept, strict=True):
                    held = plus(held, size, -1) if alive else held
                out.backward()
                storages = [ref.cdata for ref, _ in tape.watched]
    marks = {name: alive for name, alive, _ in tape.marks}
    forward, backward = (_joined(tape.stretches.get(name, {}).values()) for name in ("forward", "backward"))
    return Core(
        scale=scale,
        kept=kept,
        joined=tuple(storages.index(one) for one in storages),
        held=held,
        forward=forward,
        forward_begin=marks["forward"],
        backward=backward,
        backward_begin=marks["backward"],
    )


def _joined(fronts: Iterable[Front]) -> Front:
    found = Front()
    for front in fronts:
        for one in front.all:
            found.add(one)
    return found
