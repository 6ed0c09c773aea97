"""Activations by counting: a layer runs on shapes alone and what stays alive for its backward is added up.

No formula of what a module saves can go stale here. What is counted is a part of one layer, of two, the first and the
last, for each (tp, kind of dispatch); the rest follows because bytes are proportional to the micro-batch and the rows of
experts to etp. `tests/planning/test_memory.py` compares with whole models under FSDP2 and with real tensors.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.mesh import Grids, Layout
from qwen_moe.config import RunConfig
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.models.moe import MoE
from qwen_moe.models.plan import build_parts
from qwen_moe.planning.live_bytes import LiveBytes
from qwen_moe.training.build import DTYPES


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes of one micro-batch. ``held`` lives from forward to backward; ``working`` more exists for a moment in either."""

    held: float
    working: float


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
    """Activations of ``config``'s layers, counted when first asked for. One micro-batch of one sequence is what runs."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.model = config, config.model
        self.sequence = config.data.sequence_length
        self.dtype = DTYPES.get(config.precision.compute, torch.bfloat16)
        self._counted: dict[tuple[object, ...], Saved] = {}

    def hidden(self, tp: int) -> int:
        """Bytes of a rank's hidden states of one sequence, as they travel between layers and stages."""
        return self.sequence // tp * self.model.hidden_size * self.dtype.itemsize

    def _count(self, tp: int, ep: int, etp: int, layers: Sequence[int]) -> Saved:
        key = (tp, ep, etp, tuple((int(layer), isinstance(layer, _Middle)) for layer in layers))
        if key not in self._counted:
            self._counted[key] = count(self.config, Layout(**_fitting(tp, ep, etp)), layers, self.dtype)
        return self._counted[key]

    @cached_property
    def _middle(self) -> dict[bool, int]:
        """A layer of each kind (MoE or not); those in the middle have neither embedding nor head."""
        return {self.model.is_moe_layer(i): i for i in range(self.model.num_hidden_layers)}

    def _one(self, tp: int, ep: int, etp: int, moe: bool) -> Saved:
        """A part of one layer with neither embedding nor head, whatever the model's length."""
        return self._count(tp, ep, etp, (_Middle(self._middle[moe]),))

    def shared(self, tp: int) -> float:
        """What a part holds once, for all its layers: tables of RoPE."""
        moe = next(iter(self._middle))
        layer = _Middle(self._middle[moe])
        return 2 * self._count(tp, 1, 1, (layer,)).held - self._count(tp, 1, 1, (layer, layer)).held

    def layer(self, tp: int, ep: int, etp: int, moe: bool) -> Saved:
        """One layer, its output included (which is the next one's input)."""
        if not moe or ep * etp == 1:
            one = self._one(tp, 1, 1, moe)
        else:
            split, slices = _smallest_factor(self.model.num_experts), _smallest_factor(self.model.moe_intermediate_size)
            one = self._one(tp, split, 1, moe)
            if etp > 1:
                two = self._one(tp, 1, slices, moe)
                grow = (etp - 1) / (slices - 1)
                one = Saved(
                    held=one.held + grow * (two.held - one.held),
                    working=max(one.working, one.working + grow * (two.working - one.working)),
                )
        return Saved(held=one.held - self.shared(tp), working=one.working)

    def first(self, tp: int) -> float:
        """What the embedding adds."""
        return self._end(tp, 0).held

    def last(self, tp: int) -> Saved:
        """What the final norm, the head and the loss add."""
        return self._end(tp, self.model.num_hidden_layers - 1)

    def _end(self, tp: int, layer: int) -> Saved:
        part = self._count(tp, 1, 1, (layer,))
        if self.model.num_hidden_layers == 1:  # the two ends cannot be told apart: all counts as the last's
            return Saved(held=part.held if layer else 0.0, working=part.working)
        return Saved(held=part.held - self._one(tp, 1, 1, self.model.is_moe_layer(layer)).held, working=part.working)


class _Middle(int):
    """The index of a layer, wanted for its kind and without the embedding or head that it may have beside it."""


def _fitting(tp: int, ep: int, etp: int) -> dict[str, int]:
    return {"tp": tp, "ep": ep, "etp": etp, "dp": math.lcm(tp, ep * etp) // tp}


def count(config: RunConfig, layout: Layout, layers: Sequence[int], dtype: torch.dtype) -> Saved:
    """Run a part with ``layers`` forward and backward on fake tensors. Parameters, their gradients and the input do not
    count; the output does."""
    model = config.model
    sequence, tp = config.data.sequence_length, layout.tp
    if all(isinstance(layer, _Middle) for layer in layers):
        # The same kind of layer, repeated in the middle of a model that is long enough.
        kinds = [model.is_moe_layer(layer) for layer in layers]
        dense = tuple(index + 1 for index, moe in enumerate(kinds) if not moe)
        changes = {"num_hidden_layers": len(layers) + 2, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        model = model.model_copy(update=changes)
        layers = range(1, len(layers) + 1)
    with fake_grids(layout, model.num_key_value_heads) as grids:
        part = build_parts(model, grids, [layers], [0], recompute=False, dtype=dtype).parts[0]
        part.chunk_tokens = config.training.loss_chunk_tokens
        for module in part.modules():
            if isinstance(module, MoE):
                module.capacity_factor = config.balance.capacity_factor
        with FakeTensorMode(allow_non_fake_inputs=True):
            part.to_empty(device="cpu")
            keep_statistics_dtypes(part)
            for parameter in part.parameters():
                parameter.grad = torch.zeros_like(parameter)
            ids = torch.zeros(1, sequence, dtype=torch.int64)
            hidden = torch.zeros(1, sequence // tp, model.hidden_size, dtype=dtype, requires_grad=True)
            with LiveBytes() as bytes_:
                out = part(ids if part.first else hidden, ids)
                held = bytes_.live
                torch.autograd.backward(out, torch.ones_like(out))
                return Saved(held=held, working=max(0, bytes_.peak - held))
