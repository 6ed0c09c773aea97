"""Activations by counting: a layer runs on shapes alone and what stays alive for its backward is added up.

No formula of what a module saves can go stale here. What is counted is a part of one layer, of two, the first and the
last, for each (tp, etp, experts shared or not), with micro-batches of one and two sequences.
`tests/planning/test_memory.py` compares with whole models under FSDP2 and with real tensors.
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
    """Bytes of one micro-batch. ``held`` lives from forward to backward; ``working`` more exists for a moment in either."""

    held: float
    working: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is run to be counted: a part with ``layers``. ``middle``: their kind counts, not their place; there is neither
    embedding nor head. ``forward_only``: ``working`` is not looked for."""

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
    """The grids of a layout of any size in this process alone: every collective answers at once. Needs a process without
    a process group."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield Grids(layout, "cpu", kv_heads=kv_heads)
    finally:
        dist.destroy_process_group()


def _smallest_factor(number: int) -> int:
    """The smallest divisor above 1 (1 for 1)."""
    return next((d for d in range(2, number + 1) if number % d == 0), 1)


class SavedActivations:
    """Activations of ``config``'s layers in ``precision``, counted when first asked for.

    Bytes are ``constant + slope * micro_batch``: where the constant matters (tables of RoPE, the head's gradient that is
    formed in forward), micro-batches of one and of two sequences are counted.
    """

    def __init__(self, config: RunConfig, precision: str = "bf16") -> None:
        self.config, self.model, self.precision = config, config.model, precision
        self.sequence = config.data.sequence_length
        self._counted: dict[Run, Saved] = {}
        # A layer of each kind (MoE or not), to be counted in the middle of a model.
        self._middle = {self.model.is_moe_layer(i): i for i in range(self.model.num_hidden_layers)}

    def hidden(self, tp: int) -> int:
        """Bytes of a rank's hidden states of one sequence, as they travel between layers and stages."""
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
        """What a part holds once, for all its layers."""
        moe = next(iter(self._middle))
        two = self._at(Run(tp=tp, layers=(self._middle[moe],) * 2, middle=True, forward_only=True), micro_batch)
        return 2 * self._one(tp, moe, micro_batch).held - two.held

    def layer(self, tp: int, ep: int, etp: int, moe: bool, micro_batch: int = 1, recompute: bool = False) -> Saved:
        """One layer, its output included (which is the next one's input)."""
        run = Run(tp=tp, layers=(self._middle[moe],), middle=True, recompute=recompute, forward_only=recompute)
        if moe and etp > 1:
            run = replace(run, ep=ep, etp=etp)
        elif moe and ep > 1:  # how many ranks share the experts changes nothing but the length of lists of counts
            run = replace(run, ep=_smallest_factor(self.model.num_experts))
        found = self._at(run, micro_batch)
        return Saved(held=found.held - self.shared(tp, micro_batch), working=found.working)

    def first(self, tp: int, micro_batch: int = 1) -> float:
        """What the embedding adds."""
        return self._end(tp, 0, micro_batch).held if self.model.num_hidden_layers > 1 else 0.0

    def last(self, tp: int, micro_batch: int = 1) -> Saved:
        """What the final norm, the head and the loss add (of a model of one layer, the embedding too)."""
        return self._end(tp, self.model.num_hidden_layers - 1, micro_batch)

    def _end(self, tp: int, layer: int, micro_batch: int) -> Saved:
        part = self._at(Run(tp=tp, layers=(layer,)), micro_batch)
        inner = self._one(tp, self.model.is_moe_layer(layer), micro_batch)
        return Saved(held=part.held - inner.held, working=part.working)


def count(config: RunConfig, run: Run) -> Saved:
    """Run a part forward and backward on fake tensors. Parameters, their gradients and the input do not count; the output
    does. Raises UserError for sizes whose experts only run one by one, which needs real numbers."""
    model, layers, dtype = config.model, run.layers, DTYPES[run.precision]
    config = config.model_copy(
        update={"precision": config.precision.model_copy(update={"compute": run.precision, "kernels": "auto"})}
    )
    sequence, tp = config.data.sequence_length, run.tp
    if run.middle:
        # The same kind of layer, repeated in the middle of a model that is long enough.
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
            recompute=run.recompute,
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
                        f"etp {run.etp} is not a multiple of {16 // dtype.itemsize}, which grouped products need: such "
                        "models cannot be planned for"
                    ) from None
                return Saved(held=held, working=max(0, live.peak - held))
