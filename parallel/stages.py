"""Assigns layers to pipeline stages and stages to ranks, without torch."""

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version

from parallel.counted import counted
from parallel.mesh import LayoutError

V_SHAPED = ("zbv", "dualpipev")


def splits_backward() -> bool:
    """Whether this torch can run the V-shaped schedules, which split backward into input and weight gradients. torch 2.11
    fails with our autograd functions ("Attribute '_input_metadata' is invalid"), 2.13 works, 2.12 is untested."""
    return tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 13)


def stages_per_rank(schedule: str, asked: int = 0) -> int:
    """Stages on each rank: ``asked``, or if that is 0 the schedule's default."""
    return asked or (1 if schedule == "1f1b" else 2)


def check_schedule(schedule: str, pp: int, per_rank: int, micro_batches: int, layers: int) -> None:
    """Raise LayoutError unless ``schedule`` can run ``micro_batches`` through ``pp * per_rank`` stages of ``layers``."""
    stages = pp * per_rank
    if schedule == "1f1b" and per_rank != 1:
        raise LayoutError(
            f"schedule 1f1b has one stage per rank, not {per_rank}: use interleaved_1f1b, or leave it out"
        )
    if schedule == "interleaved_1f1b" and per_rank < 2:
        raise LayoutError("schedule interleaved_1f1b needs at least 2 stages per rank: use 1f1b for one")
    if schedule in V_SHAPED and per_rank != 2:
        raise LayoutError(f"schedule {schedule} has exactly 2 stages per rank, not {per_rank}: leave it out")
    if layers < stages:
        raise LayoutError(
            f"{counted(layers, 'layer')} cannot fill pp {pp} x {counted(per_rank, 'stage')} per rank = "
            f"{counted(stages, 'stage')}: lower one of the two"
        )
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
    if micro_batches < least:
        raise LayoutError(
            f"schedule {schedule} with pp {pp} needs at least {counted(least, 'micro-batch')} per step and "
            "data-parallel rank, not "
            f"{micro_batches}: raise the global batch, or lower the micro-batch size, pp or dp"
        )
    rounds = max(1, micro_batches // pp)
    if schedule == "interleaved_1f1b" and micro_batches % rounds:
        raise LayoutError(
            f"schedule interleaved_1f1b with pp {pp} runs {counted(micro_batches, 'micro-batch')} in "
            f"{counted(rounds, 'round')}, which must "
            "divide them: choose a multiple of pp"
        )


def split_layers(costs: Sequence[float], num_stages: int, first: float = 0.0, last: float = 0.0) -> list[list[int]]:
    """The layers of each stage, consecutive and at least one, such that the costliest stage is as cheap as possible.

    ``costs`` are per layer; ``first`` and ``last`` are the extra costs of the first stage (embedding) and the last stage
    (norm, head, loss). Ties go to the smallest sum of squared stage costs. Exact, by dynamic programming.
    """
    layers = len(costs)
    assert 1 <= num_stages <= layers
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    def cost_of(stage: int, begin: int, end: int) -> float:
        return prefix[end] - prefix[begin] + first * (stage == 0) + last * (stage == num_stages - 1)

    def best(objective: Callable[[float, float], float], limit: float) -> list[int]:
        """First layers of stages 1, 2, ... and the end, minimizing ``objective`` folded over the stages' costs."""
        table: dict[tuple[int, int], tuple[float, list[int]]] = {(num_stages, layers): (0.0, [])}
        for stage in range(num_stages - 1, -1, -1):
            for begin in range(stage, layers - (num_stages - stage) + 1):
                candidates = [
                    (objective(cost_of(stage, begin, end), table[stage + 1, end][0]), [end, *table[stage + 1, end][1]])
                    for end in range(begin + 1, layers + 1)
                    if (stage + 1, end) in table and cost_of(stage, begin, end) <= limit
                ]
                if candidates:
                    table[stage, begin] = min(candidates)
        return table[0, 0][1]

    ends = best(max, math.inf)
    peak = max(cost_of(s, begin, end) for s, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)))
    ends = best(lambda cost, rest: cost * cost + rest, peak * (1 + 1e-12))
    return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]


def ranks_of_stages(schedule: str, pp: int, per_rank: int) -> list[int]:
    """The pipeline rank that holds each stage."""
    found = {stage: rank for rank in range(pp) for stage in stages_of_rank(schedule, pp, per_rank, rank)}
    return [found[stage] for stage in range(pp * per_rank)]


def stages_of_rank(schedule: str, pp: int, per_rank: int, rank: int) -> list[int]:
    """Stages that pipeline rank ``rank`` holds, in order: looped, or V-shaped (rank 0 holds the first and the last)."""
    if schedule in V_SHAPED:
        return [rank, 2 * pp - 1 - rank]
    return [rank + pp * turn for turn in range(per_rank)]
