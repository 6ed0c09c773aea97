"""This rank's collectives from PyTorch's flight recorder, and whether all ranks of a group made the same ones."""

import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

BUFFER = "TORCH_FR_BUFFER_SIZE"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of one rank. ``number`` counts within its group; ``shapes`` and ``dtypes`` describe its inputs."""

    group: str
    ranks: tuple[int, ...]  # of the group
    number: int
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    done: bool
    age: float  # seconds since it was called
    called_from: str

    def __str__(self) -> str:
        what = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in zip(self.dtypes, self.shapes, strict=False))
        state = "done" if self.done else f"waiting for {self.age:.0f} s"
        return (
            f"{self.name}({what}) number {self.number} of {self.group} {list(self.ranks)}, {self.called_from}, {state}"
        )


def enable_recorder(entries: int = 2000) -> None:
    """Ask torch to record the last ``entries`` collectives. Call it before the process group is made."""
    os.environ.setdefault(BUFFER, str(entries))


def recorded() -> list[Collective]:
    """The recorded collectives of this rank, oldest first. NCCL records point-to-point messages too, gloo does not."""
    from torch._C import _distributed_c10d as c10d

    # The arguments below are includeCollectives, includeStackTraces, onlyActive. NCCL's recorder has its own dump function.
    dumps = [c10d._dump_fr_trace] if hasattr(c10d, "_dump_fr_trace") else []
    if hasattr(c10d, "_dump_nccl_trace") and "nccl" in str(dist.get_backend()):
        dumps = [c10d._dump_nccl_trace]
    members = _members()
    calls = []
    for dump in dumps:
        for entry in pickle.loads(dump(True, True, False)).get("entries", []):
            name, description = entry["process_group"]
            sizes, dtypes = entry.get("input_sizes", []), entry.get("input_dtypes", [])
            calls.append(
                Collective(
                    group=description or name,
                    ranks=members.get(name, ()),
                    number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
                    name=entry["profiling_name"].partition(":")[2] or entry["profiling_name"],
                    shapes=tuple(tuple(size) for size in sizes),
                    dtypes=tuple(dtypes),
                    done=bool(entry["retired"]),
                    age=time.time() - entry["time_created_ns"] / 1e9,
                    called_from=_caller(entry.get("frames", [])),
                )
            )
    return calls


def _members() -> dict[str, tuple[int, ...]]:
    world = dist.distributed_c10d._world
    return {name: tuple(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}


def _caller(frames: Sequence[Mapping[str, object]]) -> str:
    for frame in frames:
        filename = str(frame["filename"])
        if f"{os.sep}torch{os.sep}" not in filename:
            return f"{os.path.basename(filename)}:{frame['line']} in {frame['name']}"
    return "called by torch"


def _compared(call: Collective) -> tuple[object, ...]:
    if "all_to_all" in call.name or "alltoall" in call.name:  # the number of rows differs between ranks by design
        return call.name, tuple(shape[1:] for shape in call.shapes), call.dtypes
    return call.name, call.shapes, call.dtypes


def first_mismatch(traces: Mapping[int, Sequence[Collective]]) -> str | None:
    """Describe the earliest collective at which two ranks of a group differ in kind, shapes or dtypes; None if all agree.
    ``traces``: recorded collectives by rank. Only collectives that all ranks of the group have recorded are compared."""
    by_group: dict[tuple[str, tuple[int, ...]], dict[int, dict[int, Collective]]] = {}
    for rank, calls in traces.items():
        for call in calls:
            if len(call.ranks) > 1 and call.name not in ("send", "recv"):
                by_group.setdefault((call.group, call.ranks), {}).setdefault(rank, {})[call.number] = call
    for group, ranks in sorted(by_group.items()):
        if len(ranks) < 2:
            continue
        common = sorted(set.intersection(*(set(calls) for calls in ranks.values())))
        reference, *others = sorted(ranks)
        for number in common:
            for other in others:
                a, b = ranks[reference][number], ranks[other][number]
                if _compared(a) != _compared(b):
                    return f"ranks {reference} and {other} of {group[0]} differ: {a} against {b}"
    return None


def behind(traces: Mapping[int, Sequence[Collective]]) -> str | None:
    """Describe which ranks of a group have made fewer collectives than ranks that wait for them; None if there are none."""
    last: dict[tuple[str, tuple[int, ...]], dict[int, Collective]] = {}
    for rank, calls in traces.items():
        for call in calls:
            if len(call.ranks) > 1:
                last.setdefault((call.group, call.ranks), {})[rank] = call
    for (group, members), calls_by_rank in sorted(last.items()):
        waiting = {rank: call for rank, call in calls_by_rank.items() if not call.done}
        if not waiting:
            continue
        furthest = max(call.number for call in waiting.values())
        late = [r for r in members if r not in calls_by_rank or calls_by_rank[r].number < furthest]
        if late:
            rank, call = next(iter(sorted(waiting.items())))
            return f"ranks {late} have not reached collective {furthest} of {group}; rank {rank} waits in it: {call}"
    return None
