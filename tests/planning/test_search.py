"""The search shares, caches and leaves out. A plain one that does none of this finds the same."""

import random
from functools import cache
from typing import Any

import pytest
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from parallel.pipeline import SCHEDULES
from parallel.timeline import actions
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.planning.hardware import Cluster, Gpu, load_gpu, load_network
from qwen_moe.planning.layouts import Choice, legal, legal_choices
from qwen_moe.planning.memory import MemoryModel
from qwen_moe.planning.neighbors import Neighbors
from qwen_moe.planning.search import Plan, Scored, Search
from qwen_moe.planning.software import OURS
from qwen_moe.planning.step_time import StepTimeModel
from qwen_moe.planning.text import plan_text
from qwen_moe.planning.times import StepTime
from qwen_moe.sharding.layout import RunLayout
from tests.planning.recipes import random_model, turbo_style, values

GPUS, IB400 = 4, load_network("ib400")
EVERY = {"gradient_reduction": "every"}
PLAIN = tuple[StepTime, Choice, RunLayout, float]


def recipe(seed: int) -> RunConfig:
    return parse_config(values(random_model(random.Random(seed)), 512, global_batch_size=16), "test")


def gpu_of(gib: float) -> Gpu:
    return load_gpu("h100-80gb").model_copy(update={"memory_gib": gib, "reserved_gib": 0.0})


@cache
def counted(seed: int) -> MemoryModel:
    return MemoryModel(recipe(seed))


@cache
def exhaustive(seed: int) -> list[PLAIN]:
    """Every layout by itself: its own check, and models of time and memory that remember no other. In the search's order,
    each followed by itself with gradients reduced after every micro-batch, where this is another thing."""
    found, config = [], recipe(seed)
    time = StepTimeModel(config.model, config.data.sequence_length, Cluster(gpu_of(80.0), IB400, 8), OURS)
    memory = counted(seed)
    for choice, _ in legal_choices(config, GPUS, wanted=("bf16",)):
        layout = legal(config, choice, GPUS)
        assert isinstance(layout, RunLayout)
        both = layout.micro_batches > 1 and layout.layout.dp * layout.layout.cp * layout.layout.edp > 1
        for one in (choice, *([choice.changed(**EVERY)] if both else [])):
            for remembered in (time._layers, time._ends_of, time._ranks, time._means, time._collectives):
                remembered.clear()
            memory._units_of.clear()
            found.append((time.step(one, layout), one, layout, memory.fullest(one, layout).total))
    return found


def tried(found: list[PLAIN], usable: float) -> list[PLAIN]:
    """What a search looks at: gradients are reduced after every micro-batch only where the layout does not fit otherwise."""
    large = {one[1] for one in found if one[1].gradient_reduction == "last" and one[3] > usable}
    return [
        one
        for one in found
        if one[1].gradient_reduction == "last" or one[1].changed(gradient_reduction="last") in large
    ]


def degrees(choice: Choice) -> tuple[int, ...]:
    return choice.tp, choice.pp, choice.cp, choice.ep, choice.etp


def first_of_each(found: list[PLAIN], count: int) -> list[PLAIN]:
    seen: set[tuple[int, ...]] = set()
    kept = [one for one in found if not (degrees(one[1]) in seen or seen.add(degrees(one[1])))]  # type: ignore[func-returns-value]
    return kept[:count]


def differ(one: Choice, other: Choice) -> int:
    """The number of settings that differ, where a schedule and its stages are one setting."""
    names = ("recompute", "micro_batch", "sharding", "gradient_reduction", "pp", "tp", "ep", "etp", "precision")
    count = sum(getattr(one, name) != getattr(other, name) for name in names)
    if (one.pp == 1) == (other.pp == 1):  # else the schedule comes or goes with the pipeline
        count += (one.schedule, one.per_rank) != (other.schedule, other.per_rank)
    return count


def same(scored: Scored | None, plain: PLAIN | None) -> bool:
    if scored is None or plain is None:
        return scored is plain
    return (scored.step, scored.choice, scored.layout, scored.memory.total) == plain


def nearest(choice: Choice, found: list[PLAIN], usable: float) -> PLAIN | None:
    for start in (choice, choice.changed(recompute="full")):
        near = [one for one in found if differ(start, one[1]) <= 1 and one[3] <= usable]
        if near:
            return min(near, key=lambda one: one[0].total)
    return None


@pytest.mark.parametrize(("seed", "share"), [(1, 2.0), (1, 0.5), (1, 0.0), (3, 0.1)])
def test_the_search_finds_what_an_exhaustive_one_finds(seed: int, share: float) -> None:
    """To the last bit: the fastest that fit, what would be faster with more memory, and what is nearest to that; where
    nothing fits, the leanest. ``share``: of the layouts, those that fit."""
    found = exhaustive(seed)
    needed = sorted(one[3] for one in found if one[1].gradient_reduction == "last")
    room = needed[int(share * len(needed))] if share < 1 else 2 * needed[-1]
    gpu = gpu_of(room * (1 if share else 0.9) / 2**30)
    search = Search(recipe(seed), GPUS, Cluster(gpu, IB400, 8), precisions=("bf16",))
    search.memory._saved = counted(seed)._saved  # counting takes seconds
    plan: Plan = search.run(3)
    usable = gpu.usable_bytes
    by_time = sorted(tried(found, usable), key=lambda one: one[0].total)
    assert plan.legal == len(needed)
    expected = first_of_each([one for one in by_time if one[3] <= usable], 3)
    assert len(plan.best) == len(expected)
    assert all(same(scored, plain) for scored, plain in zip(plan.best, expected, strict=True))
    if expected:
        faster = by_time[: next(i for i, one in enumerate(by_time) if one[3] <= usable)]
        faster.sort(key=lambda one: counted(seed).floor(*one[1:3]) > 2 * usable)  # those that nearly fit come first
    else:
        faster = sorted(by_time, key=lambda one: one[3])
    faster = first_of_each(faster, 3)
    assert [misfit.scored.choice for misfit in plan.misfits] == [one[1] for one in faster]
    for misfit, plain in zip(plan.misfits, faster, strict=True):
        assert same(misfit.scored, plain)
        assert same(misfit.nearest, nearest(plain[1], found, usable))
    assert bool(plan.best) == (share > 0) and bool(plan.misfits) == (share < 1)


def test_gradients_reduced_after_every_micro_batch_make_a_faster_layout_fit() -> None:
    """Just enough room for one that is faster than all that fit with gradients reduced at the end."""
    found = exhaustive(1)
    last, every = ([one for one in found if one[1].gradient_reduction == name] for name in ("last", "every"))
    wanted = next(
        one
        for one in sorted(every, key=lambda one: one[0].total)
        if all(other[0].total > one[0].total for other in last if other[3] <= one[3])
    )
    search = Search(recipe(1), GPUS, Cluster(gpu_of(wanted[3] / 2**30), IB400, 8), precisions=("bf16",))
    search.memory._saved = counted(1)._saved
    plan = search.run(1)
    assert same(plan.best[0], wanted)
    assert "gradient_reduction=every" in plan_text(plan, "recipe")


def test_a_gain_that_rests_on_an_assumption_is_told_apart() -> None:
    config = turbo_style()
    search = Search(config, 16, Cluster(load_gpu("h100-80gb"), IB400, 8), precisions=("bf16",))

    def scored(choice: Choice) -> Scored:
        layout = legal(config, choice, 16)
        assert isinstance(layout, RunLayout)
        return search._whole((search._step(choice, layout), choice, layout))

    plain = scored(Choice(ep=16, micro_batch=2))
    found = search._overlapped(plain)
    assert found == scored(Choice(ep=16, micro_batch=2, ep_overlap=True))
    assert found.step.total < 0.98 * plain.step.total and found.memory.total > plain.memory.total
    for other in (Choice(micro_batch=2), Choice(ep=16), found.choice):  # no messages, no halves, chosen already
        assert search._overlapped(scored(other)) is None


def _floors(config: RunConfig, memory: MemoryModel, count: int) -> list[float]:
    """The floor divided by the memory, of ``count`` layouts in any precision of ``memory``."""
    wanted = ("bf16", "fp8") if config.precision.compute == "fp8" else ("bf16",)
    found = []
    for number, (choice, layout) in enumerate(
        random.Random(0).sample(list(legal_choices(config, GPUS, wanted=wanted)), count)
    ):
        floor = memory.floor(choice, layout)
        if number % 20 == 0:
            assert floor == MemoryModel(config).floor(choice, layout)  # which remembers no other layout
        found.append(floor / memory.fullest(choice, layout).total)
    return sorted(found)


def test_the_floor_of_memory_is_below_the_memory() -> None:
    assert _floors(recipe(1), counted(1), 60)[-1] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["delayed", "current", "blockwise", "mxfp8"])
def test_the_floor_of_long_sequences_is_below_the_memory_and_near_it(fp8: str) -> None:
    """Here activations are nearly all of the memory, and they decide whether a layout has its own layers recorded."""
    model = random_model(random.Random(4)) | {"max_position_embeddings": 32768}
    settings = values(model, 32768, global_batch_size=8) | {"precision": {"compute": "fp8", "fp8": {"recipe": fp8}}}
    config = parse_config(settings, "test")
    found = _floors(config, MemoryModel(config), 40)
    assert found[-1] <= 1 and found[len(found) // 2] > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_layouts_are_those_of_their_own_checks(seed: int) -> None:
    """The search asks once for all degrees with the same pp and dp."""
    config = recipe(seed)
    found = dict(legal_choices(config, GPUS, (1, 2, 4), least_tokens=1))
    for choice, layout in found.items():
        assert legal(config, choice, GPUS) == layout


def test_neighbors_are_those_that_differ_in_one_setting() -> None:
    config = recipe(1)
    zero: dict[str, Any] = dict.fromkeys(
        ("compute", "tp", "cp", "ep", "pp", "dp", "bubble", "imbalance", "optimizer"), 0.0
    )
    found = [(StepTime(**zero), choice, layout) for choice, layout in legal_choices(config, GPUS)]
    neighbors = Neighbors(found)
    for _, choice, _ in random.Random(0).sample(found, 40):
        assert [one[1] for one in neighbors.of(choice)] == [one[1] for one in found if differ(choice, one[1]) <= 1]


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv", "dualpipev"])
def test_actions_are_those_that_torch_lists(schedule: str) -> None:
    for pp, micro_batches, per_rank in ((2, 4, 2), (3, 6, 2), (4, 8, 2 if schedule[0] != "i" else 3)):
        listed = get_schedule_ops(SCHEDULES[schedule], pp, micro_batches, num_stages_per_rank=per_rank)
        for mine, theirs in zip(actions(schedule, pp, micro_batches, per_rank), listed, strict=True):
            parts = [part for one in theirs if one is not None for part in one.sub_actions or (one,)]
            steps = [(p.computation_type.value, p.stage_index, p.microbatch_index) for p in parts]
            assert mine == [step for step in steps if step[2] is not None]
