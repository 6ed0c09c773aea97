"""Splitting layers against brute force, refusing what a schedule cannot run, and played schedules against closed forms."""

import itertools
import random

import pytest

from parallel.mesh import LayoutError
from parallel.stages import check_schedule, split_layers, stages_of_rank
from parallel.timeline import play


def _figure(stage_costs: list[float]) -> tuple[float, float]:
    return round(max(stage_costs), 9), round(sum(cost * cost for cost in stage_costs), 6)


def _stage_costs(costs: list[int], begins: tuple[int, ...], first: float, last: float) -> list[float]:
    found = [float(sum(costs[a:b])) for a, b in itertools.pairwise([0, *begins, len(costs)])]
    found[0] += first
    found[-1] += last
    return found


def test_split_is_the_best_of_all() -> None:
    rng = random.Random(0)
    for _ in range(150):
        layers = rng.randint(1, 8)
        stages = rng.randint(1, layers)
        costs = [rng.randint(1, 9) for _ in range(layers)]
        first, last = rng.random() * 5, rng.random() * 5
        split = split_layers(costs, stages, first, last)
        assert [layer for stage in split for layer in stage] == list(range(layers)) and all(split)
        every = itertools.combinations(range(1, layers), stages - 1)
        best = min(_figure(_stage_costs(costs, begins, first, last)) for begins in every)
        assert _figure(_stage_costs(costs, tuple(stage[0] for stage in split[1:]), first, last)) == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 4, 1, 3, 8), "at least 4 micro-batches"),
        (("1f1b", 2, 2, 4, 8), "one stage per rank, not 2"),
        (("interleaved_1f1b", 2, 1, 4, 8), "at least 2 stages per rank"),
        (("interleaved_1f1b", 2, 2, 5, 8), "choose a multiple of pp"),
        (("zbv", 2, 3, 4, 8), "exactly 2 stages per rank, not 3"),
        (("dualpipev", 4, 2, 7, 8), "at least 8 micro-batches"),
        (("zbv", 4, 2, 8, 7), "7 layers cannot fill pp 4 x 2 stages per rank = 8 stages"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(arguments: tuple[str, int, int, int, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_schedule(*arguments)


def test_every_stage_is_on_one_rank() -> None:
    for schedule, per_rank in (("1f1b", 1), ("interleaved_1f1b", 3), ("zbv", 2), ("dualpipev", 2)):
        held = [stage for rank in range(4) for stage in stages_of_rank(schedule, 4, per_rank, rank)]
        assert sorted(held) == list(range(4 * per_rank))
    assert stages_of_rank("zbv", 4, 2, 0) == [0, 7]


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (4, 8), (8, 32)])
def test_idle_shares_are_the_known_ones(pp: int, micro_batches: int) -> None:
    """(p - 1) / (m + p - 1), and (p - 1) / (v m + p - 1) with v stages per rank (arXiv 2104.04473, section 2.2, there
    relative to the ideal time instead of all of it)."""
    assert play("1f1b", pp, micro_batches, 1).idle_share == pytest.approx((pp - 1) / (micro_batches + pp - 1))
    for v in (2, 4):
        found = play("interleaved_1f1b", pp, micro_batches, v)
        assert found.idle_share == pytest.approx((pp - 1) / (v * micro_batches + pp - 1))
    if micro_batches >= 2 * pp:
        for schedule in ("zbv", "dualpipev"):
            assert (
                play(schedule, pp, micro_batches, 2).idle_share
                < play("interleaved_1f1b", pp, micro_batches, 2).idle_share
            )


def test_peak_activations() -> None:
    """1F1B holds as many micro-batches as there are stages from here on; ZB-V about pp on every rank."""
    assert play("1f1b", 4, 8, 1).peak == pytest.approx([4, 3, 2, 1])
    assert play("zbv", 4, 8, 2).peak == pytest.approx([4, 4, 4, 4])


def test_a_costlier_stage_idles_the_others() -> None:
    found = play("1f1b", 2, 64, 1, costs=[1.0, 3.0])
    assert found.idle[0] == pytest.approx(2 / 3, abs=0.02) and found.idle[1] < 0.02
