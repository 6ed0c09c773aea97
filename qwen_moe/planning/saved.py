"""Counts activations: runs layers on shapes alone and adds up the tensors that stay alive for backward.

There is thus no formula of what a module saves that could become outdated. The stage modules that are run hold one layer,
two layers, the first or the last layer, for each (tp, etp, experts split or not), with micro-batches of one and two
sequences. Context parallelism changes only attention: layers are run for each of its kinds, all else without it, on as many
tokens as a rank is given. `tests/planning/test_memory.py` and `tests/planning/test_context.py` compare the counts with whole
models under FSDP2 and with real tensors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.kernels.interface import Kernels
from parallel.mesh import Grids, Layout
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.models.moe.block import MoE
from qwen_moe.objectives.build import build_objective
from qwen_moe.planning.live_bytes import LiveBytes
from qwen_moe.sharding.build import DTYPES
from qwen_moe.sharding.context import ContextAttention
from qwen_moe.sharding.kernels import choose_kernels
from qwen_moe.sharding.layout import ContextPlan
from qwen_moe.sharding.model import TrainingPart, build_parts

_TURNS = 3  # of a ring: more turns hold no more
_LONG = 16384  # tokens


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes of one micro-batch: ``held`` from forward to backward, and up to ``working`` more within either of them."""

    held: float
    working: float


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
    ``working`` is not measured."""

    split: Split = field(default_factory=Split)
    given: int
    layers: tuple[int, ...]
    micro_batch: int = 1
    middle: bool = False
    recompute: bool = False
    precision: str = "bf16"
    forward_only: bool = False


@contextmanager
def fake_grids(layout: Layout, kv_heads: int, rank: int = 0, cp_heads: int = 1) -> Iterator[Grids]:
    """The grids of a layout of any size, in this process alone: every collective returns at once. The process must not
    have a process group."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield Grids(layout, "cpu", kv_heads=kv_heads, cp_heads=cp_heads)
    finally:
        dist.destroy_process_group()


def _beyond(first: Saved, second: Saved, steps: float) -> Saved:
    """What follows ``first`` after ``steps`` steps like that to ``second``."""
    return Saved(
        held=first.held + steps * (second.held - first.held),
        working=first.working + steps * (second.working - first.working),
    )


def _smallest_factor(number: int) -> int:
    """The smallest divisor above 1; 1 for 1."""
    return next((d for d in range(2, number + 1) if number % d == 0), 1)


class SavedActivations:
    """Activations of ``config``'s layers in ``precision``, counted when they are first needed.

    Bytes are ``constant + slope * micro_batch``, found from micro-batches of one and of two sequences. The constant comes
    from RoPE's tables and from the head's gradient, which is formed in forward. In the same way bytes grow with the length:
    for more than `_LONG` tokens they are found from as many and from half as many.
    """

    def __init__(self, config: RunConfig, precision: str = "bf16") -> None:
        self.config, self.model, self.precision = config, config.model, precision
        self.sequence = config.data.sequence_length
        self._counted: dict[Run, Saved] = {}
        # A layer of each kind (MoE or not), to count in the middle of a model.
        self._middle = {self.model.is_moe_layer(i): i for i in range(self.model.num_hidden_layers)}

    def hidden(self, split: Split) -> int:
        """Bytes of a rank's hidden states of one sequence, as layers and stages pass them on."""
        return self._given(split) // split.tp * self.model.hidden_size * DTYPES[self.precision].itemsize

    def _given(self, split: Split) -> int:
        return self.sequence // split.cp

    def _count(self, run: Run) -> Saved:
        if run not in self._counted:
            self._counted[run] = count(self.config, replace(run, precision=self.precision))
        return self._counted[run]

    def _at(self, run: Run, micro_batch: int) -> Saved:
        """``run`` with a micro-batch of any size."""
        one = self._of_length(run)
        if micro_batch == 1:
            return one
        return _beyond(one, self._of_length(replace(run, micro_batch=2)), micro_batch - 1)

    def _of_length(self, run: Run) -> Saved:
        if run.given <= _LONG:
            return self._count(run)
        half = self._count(replace(run, given=_LONG // 2))
        return _beyond(half, self._count(replace(run, given=_LONG)), run.given / (_LONG // 2) - 1)

    def _plain(self, split: Split, *layers: int, middle: bool = True) -> Run:
        """A run without context and expert parallelism on as many tokens as ``split`` gives a rank."""
        return Run(split=Split(tp=split.tp), given=self._given(split), layers=layers, middle=middle)

    def shared(self, split: Split, micro_batch: int = 1) -> float:
        """Bytes that a stage module holds once for all its layers."""
        layer = next(iter(self._middle.values()))
        one = self._at(self._plain(split, layer), micro_batch)
        two = self._at(replace(self._plain(split, layer, layer), forward_only=True), micro_batch)
        return 2 * one.held - two.held

    def layer(self, split: Split, moe: bool, micro_batch: int = 1, recompute: bool = False) -> Saved:
        """Bytes of one layer, including its output, which is the next layer's input."""
        ranks = split.attention()
        if moe and split.etp > 1:
            ranks = replace(ranks, ep=split.ep, etp=split.etp)
        elif moe and split.ep > 1:  # the number of ranks changes only the length of lists of counts
            ranks = replace(ranks, ep=_smallest_factor(self.model.num_experts))
        run = replace(self._plain(split, self._middle[moe]), split=ranks)
        found = self._at(replace(run, recompute=recompute, forward_only=recompute), micro_batch)
        return Saved(held=found.held - self.shared(split, micro_batch), working=found.working)

    def first(self, split: Split, micro_batch: int = 1) -> float:
        """Bytes that the embedding adds."""
        return self._end(split, 0, micro_batch).held if self.model.num_hidden_layers > 1 else 0.0

    def last(self, split: Split, micro_batch: int = 1) -> Saved:
        """Bytes that the final norm, the head and the loss add; in a model of one layer, the embedding's too."""
        return self._end(split, self.model.num_hidden_layers - 1, micro_batch)

    def _end(self, split: Split, layer: int, micro_batch: int) -> Saved:
        part = self._at(self._plain(split, layer, middle=False), micro_batch)
        inner = self._at(self._plain(split, self._middle[self.model.is_moe_layer(layer)]), micro_batch)
        return Saved(held=part.held - inner.held, working=part.working)


def count(config: RunConfig, run: Run) -> Saved:
    """Run a stage module forward and backward on fake tensors. Parameters, their gradients and the input are not counted;
    the output is. Raises UserError for sizes whose experts run one by one, which fake tensors cannot do."""
    split, dtype = run.split, DTYPES[run.precision]
    ranks = split.tp * split.cp
    dp = math.lcm(ranks, split.ep * split.etp) // ranks
    layout = Layout(dp=dp, cp=split.cp, tp=split.tp, ep=split.ep, etp=split.etp)
    with fake_grids(layout, config.model.num_key_value_heads, cp_heads=split.context.heads) as grids:
        part, kernels = _build(config, run, grids)
        with FakeTensorMode(allow_non_fake_inputs=True):
            part.to_empty(device="cpu")
            keep_statistics_dtypes(part)
            kernels.materialize(torch.device("cpu"))
            for parameter in part.parameters():
                parameter.grad = torch.zeros_like(parameter)
            ids = torch.zeros(run.micro_batch, run.given, dtype=torch.int64)
            shape = (run.micro_batch, run.given // split.tp, config.model.hidden_size)
            hidden = torch.zeros(shape, dtype=dtype, requires_grad=True)
            with LiveBytes(peaks=not run.forward_only) as live:
                try:
                    out = part(ids if part.first else hidden, ids)
                    held = live.live
                    if not run.forward_only:
                        torch.autograd.backward(out, torch.ones_like(out))
                except DataDependentOutputException:
                    raise UserError(
                        f"model.hidden_size {config.model.hidden_size} or moe_intermediate_size "
                        f"{config.model.moe_intermediate_size} / etp {split.etp} is not a multiple of "
                        f"{16 // dtype.itemsize}, which grouped GEMMs need: such models cannot be planned for"
                    ) from None
                return Saved(held=held, working=max(0, live.peak - held))


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
    part.chunk_tokens = config.training.loss_chunk_tokens
    for module in part.modules():
        if isinstance(module, MoE):
            module.capacity_factor = config.balance.capacity_factor
        elif isinstance(module, Attention) and grids.cp.size > 1:
            module.attend = ContextAttention(run.split.context.kind, grids.cp_outer, grids.cp_heads)
    return part, built.kernels
