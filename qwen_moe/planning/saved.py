"""Counts activations: runs layers on shapes alone and adds up the tensors that stay alive for backward.

There is thus no formula of what a module saves that could become outdated. The stage modules that are run hold one layer,
two layers, the first or the last layer, for each (tp, etp, experts split or not), with micro-batches of one and two
sequences. `tests/planning/test_memory.py` compares the counts with whole models under FSDP2 and with real tensors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.mesh import Grids, Layout
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.models.moe.block import MoE
from qwen_moe.planning.live_bytes import LiveBytes
from qwen_moe.sharding.build import DTYPES
from qwen_moe.sharding.kernels import choose_kernels
from qwen_moe.sharding.model import build_parts


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes of one micro-batch: ``held`` from forward to backward, and up to ``working`` more within either of them."""

    held: float
    working: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to count: a stage module with ``layers``. With ``middle`` only the kinds of the layers matter, and there is
    neither embedding nor head. With ``forward_only``, ``working`` is not measured."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    layers: tuple[int, ...]
    micro_batch: int = 1
    middle: bool = False
    recompute: bool = False
    precision: str = "bf16"
    forward_only: bool = False


@contextmanager
def fake_grids(layout: Layout, kv_heads: int, rank: int = 0) -> Iterator[Grids]:
    """The grids of a layout of any size, in this process alone: every collective returns at once. The process must not
    have a process group."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield Grids(layout, "cpu", kv_heads=kv_heads)
    finally:
        dist.destroy_process_group()


def _smallest_factor(number: int) -> int:
    """The smallest divisor above 1; 1 for 1."""
    return next((d for d in range(2, number + 1) if number % d == 0), 1)


class SavedActivations:
    """Activations of ``config``'s layers in ``precision``, counted when they are first needed.

    Bytes are ``constant + slope * micro_batch``, found from micro-batches of one and of two sequences. The constant comes
    from RoPE's tables and from the head's gradient, which is formed in forward.
    """

    def __init__(self, config: RunConfig, precision: str = "bf16") -> None:
        self.config, self.model, self.precision = config, config.model, precision
        self.sequence = config.data.sequence_length
        self._counted: dict[Run, Saved] = {}
        # A layer of each kind (MoE or not), to count in the middle of a model.
        self._middle = {self.model.is_moe_layer(i): i for i in range(self.model.num_hidden_layers)}

    def hidden(self, tp: int) -> int:
        """Bytes of a rank's hidden states of one sequence, as layers and stages pass them on."""
        return self.sequence // tp * self.model.hidden_size * DTYPES[self.precision].itemsize

    def _count(self, run: Run) -> Saved:
        if run not in self._counted:
            self._counted[run] = count(self.config, replace(run, precision=self.precision))
        return self._counted[run]

    def _at(self, run: Run, micro_batch: int) -> Saved:
        """``run`` with a micro-batch of any size."""
        one = self._count(run)
        if micro_batch == 1:
            return one
        two = self._count(replace(run, micro_batch=2))
        more = micro_batch - 1
        return Saved(
            held=one.held + more * (two.held - one.held), working=one.working + more * (two.working - one.working)
        )

    def _one(self, tp: int, moe: bool, micro_batch: int) -> Saved:
        return self._at(Run(tp=tp, layers=(self._middle[moe],), middle=True), micro_batch)

    def shared(self, tp: int, micro_batch: int = 1) -> float:
        """Bytes that a stage module holds once for all its layers."""
        moe = next(iter(self._middle))
        two = self._at(Run(tp=tp, layers=(self._middle[moe],) * 2, middle=True, forward_only=True), micro_batch)
        return 2 * self._one(tp, moe, micro_batch).held - two.held

    def layer(self, tp: int, ep: int, etp: int, moe: bool, micro_batch: int = 1, recompute: bool = False) -> Saved:
        """Bytes of one layer, including its output, which is the next layer's input."""
        run = Run(tp=tp, layers=(self._middle[moe],), middle=True, recompute=recompute, forward_only=recompute)
        if moe and etp > 1:
            run = replace(run, ep=ep, etp=etp)
        elif moe and ep > 1:  # the number of ranks changes only the length of lists of counts
            run = replace(run, ep=_smallest_factor(self.model.num_experts))
        found = self._at(run, micro_batch)
        return Saved(held=found.held - self.shared(tp, micro_batch), working=found.working)

    def first(self, tp: int, micro_batch: int = 1) -> float:
        """Bytes that the embedding adds."""
        return self._end(tp, 0, micro_batch).held if self.model.num_hidden_layers > 1 else 0.0

    def last(self, tp: int, micro_batch: int = 1) -> Saved:
        """Bytes that the final norm, the head and the loss add; in a model of one layer, the embedding's too."""
        return self._end(tp, self.model.num_hidden_layers - 1, micro_batch)

    def _end(self, tp: int, layer: int, micro_batch: int) -> Saved:
        part = self._at(Run(tp=tp, layers=(layer,)), micro_batch)
        inner = self._one(tp, self.model.is_moe_layer(layer), micro_batch)
        return Saved(held=part.held - inner.held, working=part.working)


def count(config: RunConfig, run: Run) -> Saved:
    """Run a stage module forward and backward on fake tensors. Parameters, their gradients and the input are not counted;
    the output is. Raises UserError for sizes whose experts run one by one, which fake tensors cannot do."""
    model, layers, dtype = config.model, run.layers, DTYPES[run.precision]
    config = config.model_copy(
        update={"precision": config.precision.model_copy(update={"compute": run.precision, "kernels": "auto"})}
    )
    sequence, tp = config.data.sequence_length, run.tp
    if run.middle:
        # Put layers of these kinds into the middle of a model that is two layers longer.
        kinds = [model.is_moe_layer(layer) for layer in layers]
        dense = tuple(index + 1 for index, moe in enumerate(kinds) if not moe)
        changes = {"num_hidden_layers": len(layers) + 2, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        model, layers = model.model_copy(update=changes), tuple(range(1, len(layers) + 1))
    layout = Layout(dp=math.lcm(tp, run.ep * run.etp) // tp, tp=tp, ep=run.ep, etp=run.etp)
    with fake_grids(layout, model.num_key_value_heads) as grids:
        built = build_parts(
            model,
            grids,
            [layers],
            [0],
            recompute="full" if run.recompute else "none",
            dtype=dtype,
            kernels=choose_kernels(config, grids),
        )
        (part,) = built.parts
        part.chunk_tokens = config.training.loss_chunk_tokens
        for module in part.modules():
            if isinstance(module, MoE):
                module.capacity_factor = config.balance.capacity_factor
        with FakeTensorMode(allow_non_fake_inputs=True):
            part.to_empty(device="cpu")
            keep_statistics_dtypes(part)
            built.kernels.materialize(torch.device("cpu"))
            for parameter in part.parameters():
                parameter.grad = torch.zeros_like(parameter)
            ids = torch.zeros(run.micro_batch, sequence, dtype=torch.int64)
            hidden = torch.zeros(run.micro_batch, sequence // tp, model.hidden_size, dtype=dtype, requires_grad=True)
            with LiveBytes(peaks=not run.forward_only) as live:
                try:
                    out = part(ids if part.first else hidden, ids)
                    held = live.live
                    if not run.forward_only:
                        torch.autograd.backward(out, torch.ones_like(out))
                except DataDependentOutputException:
                    raise UserError(
                        f"model.hidden_size {model.hidden_size} or moe_intermediate_size {model.moe_intermediate_size} / "
                        f"etp {run.etp} is not a multiple of {16 // dtype.itemsize}, which grouped GEMMs need: such "
                        "models cannot be planned for"
                    ) from None
                return Saved(held=held, working=max(0, live.peak - held))
