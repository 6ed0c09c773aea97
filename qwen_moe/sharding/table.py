"""How every parameter is split over the ranks: one table.

`sharding.parallelize` applies it on the meta device, so no rank ever holds a whole model.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.mesh import Axis, Grids
from parallel.tensor import local_shape

# Parameter path -> {dim: axis that splits it}. Axes are attributes of Grids. Parameters that are not listed are replicated.
# `kv` is tp, or where tp exceeds the number of KV heads, the tp ranks that hold different heads.
SPLITS: dict[str, dict[int, str]] = {
    "model.embed_tokens.weight": {0: "tp"},
    "lm_head.weight": {0: "tp"},
    "*.self_attn.q_proj.*": {0: "tp"},
    "*.self_attn.[kv]_proj.*": {0: "kv"},
    "*.self_attn.o_proj.weight": {1: "tp"},
    "*.gate_proj.weight": {0: "tp"},
    "*.up_proj.weight": {0: "tp"},
    "*.down_proj.weight": {1: "tp"},
    "*.mlp.experts.gate_up_proj": {0: "ep", 2: "etp"},
    "*.mlp.experts.down_proj": {0: "ep", 2: "etp"},
}


@dataclass(frozen=True)
class Placement:
    """This rank's part of one parameter. ``replicas``: axes over which the parameter is replicated while its inputs are
    split, so that its gradients are partial and are summed once per step."""

    shape: tuple[int, ...]  # of the whole parameter
    offsets: tuple[int, ...]  # of this rank's part, before FSDP cuts it
    sizes: tuple[int, ...]
    replicas: tuple[Axis, ...]
    is_expert: bool


def is_expert(name: str) -> bool:
    """Whether ``name`` is a stacked weight of routed experts, which is split over the expert grid."""
    return ".mlp.experts." in name


def placement(name: str, shape: Sequence[int], grids: Grids) -> Placement:
    """This rank's placement of parameter ``name``, whose whole shape is ``shape``."""
    matching = [split for pattern, split in SPLITS.items() if fnmatch.fnmatchcase(name, pattern)]
    assert len(matching) <= 1, name
    splits = {dim: getattr(grids, axis) for dim, axis in matching[0].items()} if matching else {}
    offsets, sizes = local_shape(shape, splits)
    replicas: tuple[Axis, ...] = ()
    if not is_expert(name):
        axes = [axis.name for axis in splits.values()]
        whole = grids.kv_replica if axes == ["kv"] else None if axes else grids.tp
        replicas = (whole,) if whole is not None and whole.size > 1 else ()
    return Placement(tuple(shape), tuple(offsets), tuple(sizes), replicas, is_expert(name))
