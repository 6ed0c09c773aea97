"""What a pipeline schedule means for memory and time: micro-batches in flight and idle time, from its own actions."""

from dataclasses import dataclass
from functools import lru_cache

from parallel.stages import stages_of_rank
from parallel.timeline import BACKWARD, FORWARD, INPUT, WEIGHT, actions, play


@dataclass(frozen=True)
class Flight:
    """A pipeline rank: its stages, and the micro-batches of each that are in flight at moments when no other moment has as
    many of all of them. One between the halves of its backward counts as one and a half (see memory.py)."""

    stages: tuple[int, ...]
    moments: tuple[tuple[float, ...], ...]


def enough(pp: int, micro_batches: int) -> int:
    """A number of micro-batches that behaves like ``micro_batches``: beyond two rounds a schedule repeats itself."""
    return 2 * pp if micro_batches > 2 * pp and micro_batches % pp == 0 else micro_batches


@lru_cache(maxsize=4096)
def flights(schedule: str, pp: int, micro_batches: int, per_rank: int) -> tuple[Flight, ...]:
    """Of every pipeline rank. ``pp`` 1 runs one micro-batch after the other."""
    if pp == 1:
        return (Flight((0,), ((1,),)),)
    found = []
    for rank, order in enumerate(actions(schedule, pp, enough(pp, micro_batches), per_rank)):
        stages = stages_of_rank(schedule, pp, per_rank, rank)
        held = dict.fromkeys(stages, 0.0)
        moments: set[tuple[float, ...]] = set()
        for kind, stage, _ in order:
            held[stage] += {FORWARD: 1.0, INPUT: 0.5, WEIGHT: -1.5, BACKWARD: -1.0}[kind]
            if kind in (FORWARD, INPUT):
                moments.add(tuple(held.values()))
        most = [m for m in moments if not any(o != m and all(a >= b for a, b in zip(o, m)) for o in moments)]
        found.append(Flight(tuple(stages), tuple(sorted(most))))
    return tuple(found)


@lru_cache(maxsize=4096)
def idle_micro_batches(schedule: str, pp: int, micro_batches: int, per_rank: int) -> float:
    """Idle time of a step, in forwards and backwards of one micro-batch through an average rank, all stages alike."""
    if pp == 1:
        return 0.0
    run = enough(pp, micro_batches)
    return play(schedule, pp, run, per_rank).length / 3 - run
