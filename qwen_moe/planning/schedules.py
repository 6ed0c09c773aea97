"""Micro-batches in flight and idle time of a pipeline schedule, computed from its own actions."""

from dataclasses import dataclass
from functools import lru_cache

from parallel.stages import stages_of_rank
from parallel.timeline import BACKWARD, FORWARD, INPUT, WEIGHT, actions, play


@dataclass(frozen=True)
class Flight:
    """The stages of a pipeline rank and the Pareto-maximal numbers of micro-batches in flight per stage. ``halved``: at the
    same moments, how many of them are between the halves of their backward; empty if none ever is."""

    stages: tuple[int, ...]
    moments: tuple[tuple[float, ...], ...]
    halved: tuple[tuple[float, ...], ...] = ()


def enough(schedule: str, pp: int, micro_batches: int) -> int:
    """A smaller number of micro-batches that behaves like ``micro_batches``: after two rounds a schedule repeats itself, and
    ends alike with the same rest. Interleaved 1F1B makes longer rounds if there is a rest, and is played whole then."""
    rest = micro_batches % pp
    if rest and schedule == "interleaved_1f1b":
        return micro_batches
    return min(micro_batches, 2 * pp + rest)


def flights(schedule: str, pp: int, micro_batches: int, per_rank: int) -> tuple[Flight, ...]:
    """The `Flight` of each pipeline rank. With ``pp`` 1 micro-batches run one after another."""
    if pp == 1:
        return (Flight((0,), ((1,),)),)
    return _flights(schedule, pp, enough(schedule, pp, micro_batches), per_rank)


# Cached by the number of micro-batches that is played, which thousands of layouts share: torch makes a schedule's actions
# in tens of milliseconds.
@lru_cache(maxsize=4096)
def _flights(schedule: str, pp: int, played: int, per_rank: int) -> tuple[Flight, ...]:
    found = []
    for rank, order in enumerate(actions(schedule, pp, played, per_rank)):
        stages = stages_of_rank(schedule, pp, per_rank, rank)
        held, halved = dict.fromkeys(stages, 0.0), dict.fromkeys(stages, 0.0)
        moments: set[tuple[float, ...]] = set()
        for kind, stage, _ in order:
            held[stage] += {FORWARD: 1.0, INPUT: 0.0, WEIGHT: -1.0, BACKWARD: -1.0}[kind]
            halved[stage] += {INPUT: 1.0, WEIGHT: -1.0}.get(kind, 0.0)
            if kind in (FORWARD, INPUT):
                moments.add((*held.values(), *halved.values()))
        most = sorted(m for m in moments if not any(o != m and all(a >= b for a, b in zip(o, m)) for o in moments))
        count, splits = len(stages), any(any(m[len(stages) :]) for m in most)
        halves = tuple(m[count:] for m in most) if splits else ()
        found.append(Flight(tuple(stages), tuple(m[:count] for m in most), halves))
    return tuple(found)


def idle_micro_batches(schedule: str, pp: int, micro_batches: int, per_rank: int) -> float:
    """Idle time of a step. The unit is the forward and backward of a micro-batch on a rank; all stages are equally slow."""
    if pp == 1:
        return 0.0
    return _idle(schedule, pp, enough(schedule, pp, micro_batches), per_rank)


@lru_cache(maxsize=4096)
def _idle(schedule: str, pp: int, played: int, per_rank: int) -> float:
    return play(schedule, pp, played, per_rank).length / 3 - played
