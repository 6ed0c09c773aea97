"""The share of the parameters that one rank holds, by the sharding table and `parallel.data.cut_dim`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from parallel.data import cut_dim
from parallel.mesh import Axis, Layout
from qwen_moe.config import ModelConfig
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.sharding.table import is_expert, placement


@dataclass(frozen=True)
class Place:
    """A rank's index on each axis of both grids (see parallel/mesh.py). ``data``: among the dp x cp ranks."""

    data: int = 0
    tp: int = 0
    edp: int = 0
    ep: int = 0
    etp: int = 0


FIRST = Place()  # holds the largest share of everything that does not divide evenly


def place_of(layout: Layout, rank: int) -> Place:
    """The place of world rank ``rank`` within its stage."""
    inner = rank % layout.stage_size
    exchange = layout.ep * layout.etp
    return Place(
        data=inner // layout.tp,
        tp=inner % layout.tp,
        edp=inner // exchange,
        ep=inner % exchange // layout.etp,
        etp=inner % layout.etp,
    )


@dataclass(frozen=True, kw_only=True)
class UnitShare:
    """Elements of one FSDP unit on a rank: ``whole`` before FSDP shards it, ``sharded`` after, and ``padded`` when it is
    gathered, with the dim that is cut padded to a multiple of the ranks. ``copied`` of these belong to parameters that are
    not cut along dim 0, which FSDP2 copies once more around each collective. ``tensors`` is its number of parameters."""

    whole: int
    padded: int
    sharded: int
    tensors: int
    copied: int = 0


def _axes(layout: Layout, place: Place, kv_heads: int) -> Any:
    """The axes that `placement` reads from Grids, without process groups."""
    held = min(layout.tp, kv_heads)
    copies = layout.tp // held
    return SimpleNamespace(
        tp=Axis("tp", layout.tp, place.tp, None),
        kv=Axis("kv", held, place.tp // copies, None),
        kv_replica=Axis("kv_replica", copies, place.tp % copies, None),
        ep=Axis("ep", layout.ep, place.ep, None),
        etp=Axis("etp", layout.etp, place.etp, None),
    )


@lru_cache(maxsize=64)
def _shapes(model: ModelConfig, layer: int) -> dict[str, torch.Size]:
    """Parameters of a stage module that holds only layer ``layer``, with the embedding or head that go with it."""
    with torch.device("meta"):
        return {name: p.shape for name, p in DecoderLM(model, layers=[layer]).named_parameters()}


class Shares:
    """FSDP units of ``model`` in any layout. Layers of the same kind have the same units."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self._units: dict[Any, tuple[UnitShare, ...]] = {}

    def layer(self, layout: Layout, moe: bool, place: Place = FIRST) -> tuple[UnitShare, ...]:
        """The units of one layer: (the layer without experts, its experts) or (the layer)."""
        index = next(i for i in range(self.model.num_hidden_layers) if self.model.is_moe_layer(i) == moe)
        names = [name for name in _shapes(self.model, index) if ".layers." in name]
        dense = [name for name in names if not is_expert(name)]
        experts = [name for name in names if is_expert(name)]
        return self._of(("layer", moe), layout, place, index, [dense, experts] if experts else [dense])

    def root(self, layout: Layout, first: bool, last: bool, place: Place = FIRST) -> UnitShare:
        """The unit of a stage outside its layers: embedding, final norm and head."""
        found: dict[str, int] = {}
        for index, wanted in ((0, first), (self.model.num_hidden_layers - 1, last)):
            if wanted:
                found |= {name: index for name in _shapes(self.model, index) if ".layers." not in name}
        parts = [
            self._of(("root", name), layout, place, index, [[name]])[0]
            for name, index in found.items()
            if last or name == "model.embed_tokens.weight"
        ]
        return add(parts)

    def _of(self, what: Any, layout: Layout, place: Place, index: int, units: list[list[str]]) -> tuple[UnitShare, ...]:
        key = (what, layout, place)
        if key not in self._units:
            shapes, axes = _shapes(self.model, index), _axes(layout, place, self.model.num_key_value_heads)
            found = []
            for names in units:
                whole = padded = sharded = copied = 0
                for name in names:
                    sizes = placement(name, shapes[name], axes).sizes
                    data = (layout.dp * layout.cp, place.data)
                    ranks, mine = (layout.edp, place.edp) if is_expert(name) else data
                    dim, elements = cut_dim(sizes, ranks), math.prod(sizes)
                    row, chunk = elements // sizes[dim], -(-sizes[dim] // ranks)
                    whole += elements
                    padded += chunk * ranks * row
                    sharded += min(chunk, max(0, sizes[dim] - mine * chunk)) * row
                    copied += elements if dim else 0
                found.append(UnitShare(whole=whole, padded=padded, sharded=sharded, tensors=len(names), copied=copied))
            self._units[key] = tuple(found)
        return self._units[key]


def add(units: Iterable[UnitShare]) -> UnitShare:
    """The sum of ``units``, field by field."""
    units = list(units)
    return UnitShare(
        whole=sum(u.whole for u in units),
        padded=sum(u.padded for u in units),
        sharded=sum(u.sharded for u in units),
        tensors=sum(u.tensors for u in units),
        copied=sum(u.copied for u in units),
    )
