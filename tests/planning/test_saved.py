"""Activations from recorded runs against whole stage modules, counted at their own sizes with their own attention."""

import random
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.expert import Exchange
from parallel.mesh import Layout
from qwen_moe.config import BalanceConfig, RunConfig, parse_config
from qwen_moe.planning.counting import Run, Saved, Split, count, fake_grids
from qwen_moe.planning.layouts import Choice, legal_choices
from qwen_moe.planning.memory import MemoryModel
from qwen_moe.planning.saved import SavedActivations
from qwen_moe.planning.tape import Bytes, NotProportional, Padded, Scale, prime_without
from qwen_moe.sharding.layout import ContextPlan, RunLayout
from tests.planning.recipes import random_model, values

PAIRS, QUICK = 72, 4
FP8 = ("blockwise", "blockwise", "mxfp8", "current", "delayed")


class Whole(SavedActivations):
    """Counts a whole layer for every split, micro-batch and length, and the ends of a model with the layer beside them."""

    def shared(self, split: Split, micro_batch: int = 1) -> float:
        layer = next(iter(self._middle.values()))
        run = Run(split=Split(tp=split.tp), given=self._given(split), layers=(layer,), micro_batch=micro_batch)
        run = replace(run, middle=True, precision=self.precision, forward_only=True)
        return 2 * self._count(run).held - self._count(replace(run, layers=(layer, layer))).held

    def _layer(self, run: Run) -> Saved:
        return self._count(run)

    def _end(self, split: Split, layer: int, micro_batch: int) -> Saved:
        run = Run(split=Split(tp=split.tp), given=self._given(split), layers=(layer,), micro_batch=micro_batch)
        run = replace(run, precision=self.precision)
        part, inner = self._count(run), self._count(replace(run, middle=True))
        between = max(0.0, part.between - inner.between)  # a stage that begins with token ids keeps none
        return Saved(held=part.held - inner.held, working=part.working, between=between)


def case(seed: int) -> tuple[RunConfig, Choice, RunLayout]:
    """Any recipe and layout. Half of them have context parallelism, if the sequence can be cut."""
    rng = random.Random(seed)
    sequence = rng.choice([512, 1024, 4096, 49152])
    recipe = values(
        random_model(rng) | {"max_position_embeddings": sequence},
        sequence,
        global_batch_size=64,
        loss_chunk_tokens=sequence // 4,
    )
    if rng.random() < 0.6:
        recipe["precision"] = {"compute": "fp8", "fp8": {"recipe": rng.choice(FP8)}}
    config = parse_config(recipe, "test")
    width = config.model.moe_intermediate_size
    found = [
        (choice, layout)
        for choice, layout in legal_choices(config, rng.choice([4, 8, 16]), (1, 2, 4), least_tokens=64)
        if width // choice.etp % 16 == 0
    ]
    kind = rng.choice(sorted({(c.cp > 1, c.cp_kind, c.cp_ulysses > 1, c.precision) for c, _ in found}))
    choice, layout = rng.choice(
        [(c, f) for c, f in found if (c.cp > 1, c.cp_kind, c.cp_ulysses > 1, c.precision) == kind]
    )
    return config, choice.changed(ep_overlap=config.model.is_moe_family and choice.ep * choice.etp > 1), layout


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] * (s >= QUICK)) for s in range(PAIRS)])
def test_bytes_are_those_of_whole_layers(seed: int) -> None:
    """Activations to the byte. Working memory within 1%: while the head runs, its stage still has the router's statistics,
    which are not the head's."""
    config, choice, layout = case(seed)
    recorded, whole = MemoryModel(config), MemoryModel(config)
    whole._saved[choice.precision] = Whole(config, choice.precision)
    found, expected = recorded.fullest(choice, layout), whole.fullest(choice, layout)
    assert found.activations == expected.activations
    assert found.working == pytest.approx(expected.working, rel=0.01)
    assert found.total == pytest.approx(expected.total, rel=0.01)
    stage = len(layout.layers) - 1
    halves = (model._stage_activations(choice, layout, stage).between for model in (recorded, whole))
    assert next(halves) == pytest.approx(next(halves), rel=0.02)


@pytest.mark.parametrize(("ep", "etp", "rows"), [(8, 2, 28), (4, 2, 29), (2, 4, 31), (8, 1, 27), (4, 4, 32)])
def test_all_slices_of_an_expert_get_its_rows(ep: int, etp: int, rows: int) -> None:
    """Also where the rows cannot be shared evenly: ranks that hold slices of the same experts get as many."""
    with fake_grids(Layout(dp=ep * etp, ep=ep, etp=etp), 2) as grids, FakeTensorMode(allow_non_fake_inputs=True):
        plan = Exchange(grids.exchange, etp, 16).plan(torch.zeros(16, dtype=torch.int64), rows)
    by_holder = [plan.send[start : start + etp] for start in range(0, ep * etp, etp)]
    assert all(len(set(same)) == 1 for same in by_holder) and sum(same[0] for same in by_holder) == rows
    assert sum(plan.receive) == rows * etp


def test_dropped_choices_can_be_planned_for() -> None:
    """How many are dropped is a value, which shapes alone do not have."""
    config = case(4)[0]
    dropping = config.model_copy(update={"balance": BalanceConfig(capacity_factor=0.5)})
    for ep in (1, 2):
        run = Run(split=Split(ep=ep), given=64, layers=(config.model.moe_layers[0],), middle=True)
        without, found = count(config, run), count(dropping, run)
        assert without.held <= found.held < 1.1 * without.held and without.working <= found.working


@pytest.mark.slow
def test_the_pairs_differ() -> None:
    cases = [case(seed) for seed in range(PAIRS)]
    choices = [choice for _, choice, _ in cases]
    assert {(choice.cp_kind, choice.cp_ulysses > 1) for choice in choices if choice.cp > 1} == {
        ("ring", False), ("ring", True), ("all_gather", False), ("all_gather", True), ("ulysses", False)}  # fmt: skip
    assert {choice.recompute for choice in choices} == {"none", "full"}
    assert {choice.schedule for choice in choices if choice.pp > 1} >= {"1f1b", "interleaved_1f1b", "zbv", "dualpipev"}
    assert {config.precision.fp8.recipe for config, choice, _ in cases if choice.precision == "fp8"} == set(FP8)
    assert any(choice.tp > 1 for choice in choices) and any(choice.etp > 1 for choice in choices)
    assert any(choice.overlaps for choice in choices) and any(choice.micro_batch == 4 for choice in choices)


def test_one_recording_serves_all_lengths_and_micro_batches() -> None:
    """In FP8 two: one with padded rows, one without."""
    recipe = values({"preset": "demo", "num_hidden_layers": 2, "max_position_embeddings": 65536}, 65536)
    config = parse_config(recipe, "test")
    for precision, bodies in (("bf16", 1), ("fp8", 2)):
        activations = SavedActivations(config, precision)
        for cp in (2, 16, 256):
            for micro_batch in (1, 2, 8):
                activations.layer(Split(cp=cp, context=ContextPlan(kind="ring")), True, micro_batch)
        recorded = [(run, scale) for what, run, scale in activations._known if what == "body" and not run.forward_only]
        assert len(recorded) == bodies
        assert not any(scale.exact for _, scale in recorded)
        assert len([key for key in activations._known if key[0] == "core"]) == 2  # of two ranks, and of more


def test_what_is_not_proportional_is_counted_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(values({"preset": "demo", "num_hidden_layers": 2}, 1024), "test")
    expected = [SavedActivations(config).layer(Split(tp=2), True, batch) for batch in (1, 2)]

    def refuse(scale: Scale, size: int) -> Bytes:
        if not scale.exact:
            raise NotProportional(size)
        return size, 0, 0, 0, 0

    monkeypatch.setattr(Scale, "split", refuse)
    activations = SavedActivations(config)
    assert [activations.layer(Split(tp=2), True, batch) for batch in (1, 2)] == expected
    assert all(scale.exact for _, _, scale in activations._known)


def test_a_size_tells_what_it_grows_with() -> None:
    scale = Scale(101, 2 * 100003, (101, 100003))
    assert scale.split(3 * 101 * 100003) == (0, 0, 0, 3 * 101 * 100003, 0)
    assert scale.split(5 * 100003) == (0, 5 * 100003, 0, 0, 0)
    assert scale.split(7 * 101) == (0, 0, 7 * 101, 0, 0)
    assert scale.split(11) == (11, 0, 0, 0, 0)
    with pytest.raises(NotProportional):
        scale.split(101 * 100003 + 1)
    found = (11, 5 * 100003, 7 * 101, 3 * 101 * 100003, 0)
    assert scale.at(found, 2, 8) == 11 + 5 * 4 + 7 * 2 + 3 * 2 * 4


def test_padded_rows_are_those_of_each_expert() -> None:
    padded = Padded(per_token=2.0, experts=3, multiple=4)
    assert padded.rows(10) == 8 + 8 + 8 and padded.needed(10)  # 7, 7 and 6 rows
    assert padded.rows(6) == 12 and not padded.needed(6)
    assert prime_without((101, 2 * 103), 101) == 107
