"""Two grids over the same ranks: dense (pp, dp, cp, tp) and expert (pp, edp, ep, etp) (arXiv 2504.14960).

Rank r of the world is ``((pp_index * dp + dp_index) * cp + cp_index) * tp + tp_index``; the expert grid cuts the same
``dp * cp * tp`` ranks of a stage as ``(edp_index * ep + ep_index) * etp + etp_index``. So ep may span tp and dp ranks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.counted import counted

if TYPE_CHECKING:  # torch is imported where groups are made, so degrees are checked before anything waits for it
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


class LayoutError(ValueError):
    """Degrees that do not fit each other or the number of processes; the message names every factor."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of every axis. ``tp > 1`` implies sequence parallelism. ``edp`` follows from the others."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "cp", "tp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}: every degree is at least 1")
        if self.stage_size % (self.ep * self.etp):
            raise LayoutError(
                f"experts do not fit the stage: tp {self.tp} x cp {self.cp} x dp {self.dp} = "
                f"{counted(self.stage_size, 'rank is', 'ranks are')} "
                f"not a multiple of ep {self.ep} x etp {self.etp} = {self.ep * self.etp}"
            )

    @property
    def stage_size(self) -> int:
        """Ranks that share the layers of one pipeline rank."""
        return self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        return self.stage_size // (self.ep * self.etp)

    @property
    def world_size(self) -> int:
        return self.pp * self.stage_size

    def __str__(self) -> str:
        degrees = {name: getattr(self, name) for name in ("tp", "cp", "dp", "pp", "ep", "etp")}
        return ",".join(f"{name}={value}" for name, value in degrees.items() if value > 1) or "one process"


def layout_for(world_size: int, *, pp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1) -> Layout:
    """The layout of ``world_size`` processes; dp is what the other degrees leave. Raises LayoutError naming every factor."""
    model = tp * cp * pp
    if world_size % model:
        raise LayoutError(
            f"{counted(world_size, 'process is', 'processes are')} not a multiple of tp {tp} x cp {cp} x pp {pp} = "
            f"{model}: start "
            f"{smallest_world(1, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)} (or a multiple), or change a degree"
        )
    stage = world_size // pp
    if stage % (ep * etp):
        raise LayoutError(
            f"{counted(world_size, 'process')} / pp {pp} = {stage} per stage are not a multiple of ep {ep} x etp {etp} = "
            f"{ep * etp}: start {smallest_world(1, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)} (or a multiple), or change a degree"
        )
    return Layout(pp=pp, dp=world_size // model, cp=cp, tp=tp, ep=ep, etp=etp)


def smallest_world(at_least: int, *, pp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1) -> int:
    """The smallest number of processes, not below ``at_least``, that these degrees divide."""
    world = at_least
    while world % (tp * cp * pp) or (world // pp) % (ep * etp):
        world += 1
    return world


@dataclass(frozen=True)
class Axis:
    """One axis of a grid as a rank sees it: its group, the group's size and the rank's index in it."""

    name: str
    size: int
    index: int
    group: "dist.ProcessGroup | None"


class Grids:
    """The groups of this rank on both grids. All ranks must construct it together: it creates process groups.

    ``data``: the dp x cp ranks that hold the same dense parameters and different tokens; FSDP shards over them
    (``dense_shard``). ``stage``: all ranks with this rank's layers. ``exchange``: the ep x etp ranks among which tokens
    travel (index = ep_index * etp + etp_index). Where tp exceeds the KV heads, ``kv`` is the tp ranks that hold different
    heads and ``kv_replica`` the tp ranks that hold the same head. ``cp_heads``: neighbors of ``cp_heads`` cp ranks, which
    exchange tokens for heads; ``cp_outer``: the cp ranks with the same index among their neighbors.
    """

    def __init__(self, layout: Layout, device_type: str, kv_heads: int = 1, cp_heads: int = 1) -> None:
        import torch.distributed as dist

        world, rank = dist.get_world_size(), dist.get_rank()
        if world != layout.world_size:
            raise LayoutError(f"layout {layout} is for {counted(layout.world_size, 'process')} but there are {world}")
        self.layout = layout
        self.world = Axis("world", world, rank, None)
        self.dense = self._mesh(device_type, {"pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp})
        exchange = layout.ep * layout.etp
        self.expert = self._mesh(device_type, {"pp": layout.pp, "edp": layout.edp, "exchange": exchange})
        self.pp, self.dp, self.cp, self.tp = (self._axis(self.dense, name) for name in ("pp", "dp", "cp", "tp"))
        if layout.cp == 1:
            self.dense_shard, self.data = self.dense["dp"], self.dp
        else:  # dp and cp are adjacent in the rank order, so one axis can cover both
            joint = self._mesh(device_type, {"pp": layout.pp, "data": layout.dp * layout.cp, "tp": layout.tp})
            self.dense_shard, self.data = joint["data"], self._axis(joint, "data")
        self.edp, self.exchange = self._axis(self.expert, "edp"), self._axis(self.expert, "exchange")
        # Nothing communicates over ep or etp alone, so they need no groups of their own.
        self.ep = Axis("ep", layout.ep, self.exchange.index // layout.etp, None)
        self.etp = Axis("etp", layout.etp, self.exchange.index % layout.etp, None)
        self.stage = self._axis(self._mesh(device_type, {"pp": layout.pp, "stage": layout.stage_size}), "stage")
        kv_ranks = min(layout.tp, kv_heads)
        if kv_ranks == layout.tp:
            self.kv, self.kv_replica = self.tp, Axis("kv_replica", 1, 0, None)
        else:
            heads = self._mesh(
                device_type, {"rest": world // layout.tp, "kv": kv_ranks, "kv_replica": layout.tp // kv_ranks}
            )
            self.kv, self.kv_replica = self._axis(heads, "kv"), self._axis(heads, "kv_replica")

        self.cp_outer, self.cp_heads = self._context(device_type, cp_heads)

    def _context(self, device_type: str, heads: int) -> tuple[Axis, Axis]:
        cp, outer = self.layout.cp, self.layout.cp // heads
        alone = Axis("alone", 1, 0, None)
        if heads == 1 or outer == 1:
            return (self.cp, alone) if heads == 1 else (alone, self.cp)
        rest = self.layout.world_size // (cp * self.layout.tp)
        degrees = {"rest": rest, "cp_outer": outer, "cp_heads": heads, "tp": self.layout.tp}
        mesh = self._mesh(device_type, degrees)
        return self._axis(mesh, "cp_outer"), self._axis(mesh, "cp_heads")

    @staticmethod
    def _mesh(device_type: str, degrees: dict[str, int]) -> "DeviceMesh":
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))

    @staticmethod
    def _axis(mesh: "DeviceMesh", name: str) -> Axis:
        sub = mesh[name]
        return Axis(name, sub.size(), sub.get_local_rank(), sub.get_group())

    @property
    def expert_shard(self) -> "DeviceMesh":
        """The mesh over which FSDP shards experts."""
        return self.expert["edp"]
