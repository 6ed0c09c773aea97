"""When each rank of a pipeline does what: a schedule's actions played through with given durations."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from parallel.pipeline import SCHEDULES

# Kinds of work: forward, full backward, backward by inputs, backward by weights.
FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One action of a rank. Times in units of a forward through an average rank's layers."""

    rank: int
    stage: int
    micro_batch: int
    kind: str
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step of a pipeline. ``peak`` per rank: the most activations held at once, in micro-batches through an average
    rank's layers."""

    work: list[Work]
    ranks: int
    length: float
    idle: list[float]  # share of the step, per rank
    peak: list[float]

    @property
    def idle_share(self) -> float:
        """Idle time of all ranks over all their time: the bubble."""
        return sum(self.idle) / self.ranks


def _one_forward_one_backward(pp: int, rank: int, micro_batches: int) -> list[tuple[str, int, int]]:
    """Schedule1F1B, which runs without a list of actions: as many forwards as there are stages from here to the end,
    then a backward and a forward in turn, then the backwards that are left."""
    ahead = min(micro_batches, pp - rank)
    order = [(FORWARD, rank, m) for m in range(ahead)]
    for m in range(micro_batches):
        order.append((BACKWARD, rank, m))
        if ahead + m < micro_batches:
            order.append((FORWARD, rank, ahead + m))
    return order


def actions(schedule: str, pp: int, micro_batches: int, per_rank: int) -> list[list[tuple[str, int, int]]]:
    """(kind, stage, micro-batch) of every rank in order."""
    if schedule == "1f1b":
        return [_one_forward_one_backward(pp, rank, micro_batches) for rank in range(pp)]
    found = []
    for rank in get_schedule_ops(SCHEDULES[schedule], pp, micro_batches, num_stages_per_rank=per_rank):
        order: list[tuple[str, int, int]] = []
        for action in rank:
            for part in () if action is None else action.sub_actions or (action,):
                if part.microbatch_index is not None:
                    order.append((part.computation_type.value, part.stage_index, part.microbatch_index))
        found.append(order)
    return found


def play(schedule: str, pp: int, micro_batches: int, per_rank: int, costs: Sequence[float] | None = None) -> Timeline:
    """Play ``schedule`` through. ``costs`` of a forward through each stage (equal by default) are scaled so that those
    of a rank are 1 on average; a backward takes twice as long, each of its halves once. Messages take no time."""
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
        assert moved, f"{schedule} with pp {pp} and {micro_batches} micro-batches waits for itself"
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
    """When what an action needs is there; None when it has not been played yet."""
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
    """Activations are held from the begin of a forward to the end of the backward by weights."""
    events = []
    for item in work:
        if item.kind == FORWARD:
            events.append((item.begin, 1, share[item.stage]))
        elif item.kind in (BACKWARD, WEIGHT):
            events.append((item.end, 0, -share[item.stage]))  # at one moment, what ends comes before what begins
    held = peak = 0.0
    for _, _, change in sorted(events):
        held += change
        peak = max(peak, held)
    return peak
