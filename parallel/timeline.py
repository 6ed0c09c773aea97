"""Simulates a pipeline schedule with given durations: what each rank does when."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from parallel.counted import counted
from parallel.pipeline import SCHEDULES

# Kinds of work: forward, full backward, backward for input gradients, backward for weight gradients.
FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One action of a rank. Times are in units of one forward through an average rank's layers."""

    rank: int
    stage: int
    micro_batch: int
    kind: str
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One pipeline step. ``peak``: per rank, the most activations held at once, in units of one micro-batch through an
    average rank's layers."""

    work: list[Work]
    ranks: int
    length: float
    idle: list[float]  # share of the step, per rank
    peak: list[float]

    @property
    def idle_share(self) -> float:
        """The bubble: idle time of all ranks divided by their total time."""
        return sum(self.idle) / self.ranks


def _one_forward_one_backward(pp: int, rank: int, micro_batches: int) -> list[tuple[str, int, int]]:
    """The actions of Schedule1F1B, for which torch makes no list: one forward for each stage from this one to the last,
    then backward and forward in turn, then the remaining backwards."""
    ahead = min(micro_batches, pp - rank)
    order = [(FORWARD, rank, m) for m in range(ahead)]
    for m in range(micro_batches):
        order.append((BACKWARD, rank, m))
        if ahead + m < micro_batches:
            order.append((FORWARD, rank, ahead + m))
    return order


@lru_cache(maxsize=1024)
def actions(schedule: str, pp: int, micro_batches: int, per_rank: int) -> list[list[tuple[str, int, int]]]:
    """(kind, stage, micro-batch) of every rank in order. Cached: do not modify the result."""
    if schedule == "1f1b":
        return [_one_forward_one_backward(pp, rank, micro_batches) for rank in range(pp)]
    by_rank = []
    # All that a schedule asks of stages to order its actions. (torch's get_schedule_ops takes mocks, which cost more than
    # the actions.)
    stage: Any = SimpleNamespace(group_rank=0, group_size=pp, num_stages=pp * per_rank, submod=None)
    order_of: Any = SCHEDULES[schedule]([stage] * per_rank, micro_batches)
    for rank in (order_of.pipeline_order[rank] for rank in range(pp)):
        order: list[tuple[str, int, int]] = []
        for action in rank:
            for part in () if action is None else action.sub_actions or (action,):
                if part.microbatch_index is not None:
                    order.append((part.computation_type.value, part.stage_index, part.microbatch_index))
        by_rank.append(order)
    return by_rank


def play(schedule: str, pp: int, micro_batches: int, per_rank: int, costs: Sequence[float] | None = None) -> Timeline:
    """Simulate ``schedule``. ``costs``: of a forward through each stage (equal by default), scaled so that a rank's total is
    1 on average. A full backward takes twice a forward, each of its halves as long as one. Messages take no time."""
    stages = pp * per_rank
    costs = list(costs) if costs is not None else [1.0] * stages
    scale = pp / sum(costs)
    share = [cost * scale for cost in costs]
    factor = {FORWARD: 1.0, BACKWARD: 2.0, INPUT: 1.0, WEIGHT: 1.0}
    queues = actions(schedule, pp, micro_batches, per_rank)
    done: dict[tuple[str, int, int], float] = {}
    clock, position, work = [0.0] * pp, [0] * pp, []
    remaining = sum(len(queue) for queue in queues)
    while remaining:
        moved = False
        for rank, queue in enumerate(queues):
            while position[rank] < len(queue):
                kind, stage, micro_batch = queue[position[rank]]
                ready = _ready(kind, stage, micro_batch, stages, done)
                if ready is None:
                    break
                begin = max(clock[rank], ready)
                end = begin + factor[kind] * share[stage]
                work.append(Work(rank=rank, stage=stage, micro_batch=micro_batch, kind=kind, begin=begin, end=end))
                done[kind, stage, micro_batch] = clock[rank] = end
                position[rank] += 1
                remaining -= 1
                moved = True
        assert moved, f"{schedule} with pp {pp} and {counted(micro_batches, 'micro-batch')} waits for itself"
    length = max(clock)
    busy = [sum(item.end - item.begin for item in work if item.rank == rank) for rank in range(pp)]
    return Timeline(
        work=work,
        ranks=pp,
        length=length,
        idle=[1 - b / length for b in busy],
        peak=[_peak([item for item in work if item.rank == rank], share) for rank in range(pp)],
    )


def _ready(
    kind: str, stage: int, micro_batch: int, stages: int, done: dict[tuple[str, int, int], float]
) -> float | None:
    """The time at which an action's inputs are ready; None if one of them has not been simulated yet."""
    if kind == FORWARD:
        return 0.0 if stage == 0 else done.get((FORWARD, stage - 1, micro_batch))
    if kind == WEIGHT:
        return done.get((INPUT, stage, micro_batch))
    needed = done.get((FORWARD, stage, micro_batch))
    if needed is None or stage == stages - 1:
        return needed
    for backward in (BACKWARD, INPUT):
        if (backward, stage + 1, micro_batch) in done:
            return max(needed, done[backward, stage + 1, micro_batch])
    return None


def _peak(work: Sequence[Work], share: Sequence[float]) -> float:
    """The most activations held at once: each is held from the start of its forward to the end of its weight backward."""
    events = []
    for item in work:
        if item.kind == FORWARD:
            events.append((item.begin, 1, share[item.stage]))
        elif item.kind in (BACKWARD, WEIGHT):
            events.append((item.end, 0, -share[item.stage]))  # at equal times, ends sort before begins
    held = peak = 0.0
    for _, _, change in sorted(events):
        held += change
        peak = max(peak, held)
    return peak
