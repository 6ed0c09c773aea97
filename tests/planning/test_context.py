"""Context parallelism in plans: bytes sent against the collectives that attention calls, bytes held against built ranks and
against real ones, and the search."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import parallel.context
import qwen_moe.sharding.context
from parallel import gemm
from parallel.mesh import Axis, Layout
from qwen_moe.cli import main
from qwen_moe.config import RunConfig, load_config, parse_config
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.flops import flops_per_token
from qwen_moe.planning.context import ContextTime, traffic
from qwen_moe.planning.counting import Run, Split, count, fake_grids
from qwen_moe.planning.hardware import Cluster, load_gpu, load_network
from qwen_moe.planning.layouts import Choice, apply, kinds, legal_choices
from qwen_moe.planning.memory import MemoryModel
from qwen_moe.planning.rates import Rates
from qwen_moe.planning.saved import SavedActivations
from qwen_moe.planning.schedules import Flight
from qwen_moe.planning.search import Search
from qwen_moe.planning.software import OURS
from qwen_moe.planning.step_time import StepTimeModel
from qwen_moe.sharding.context import ContextAttention
from qwen_moe.sharding.layout import ContextPlan, RunLayout, run_layout
from tests.distributed import run_distributed
from tests.planning.recipes import random_model, values
from tests.planning.test_memory import allocator_bytes, counted, predict

BUILT = 20  # pairs of model and layout
# Attention is most of a layer.
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 64}
KINDS = [("ring", 1), ("all_gather", 1), ("all_gather", 4), ("ring", 2), ("all_gather", 2)]


def model(**changes: Any) -> dict[str, Any]:
    return {"preset": "demo", "num_hidden_layers": 3, "tie_word_embeddings": False} | changes


@pytest.mark.parametrize(("kind", "heads"), KINDS)
def test_bytes_sent_are_those_of_the_collectives(monkeypatch: pytest.MonkeyPatch, kind: Any, heads: int) -> None:
    """Of 4 ranks, counted where attention calls a collective. A ring of n ranks sends (n - 1) / n of what is gathered."""
    sent = {"forward": 0.0, "backward": 0.0}
    now = "forward"

    def all_to_all(out: torch.Tensor, x: torch.Tensor, *splits: Any, group: Any = None, async_op: bool = False) -> Any:
        parts = splits[1] if splits else [x.numel() // group.size()] * group.size()
        others = sum(part for rank, part in enumerate(parts) if rank != group.rank())
        sent[now] += others * x.element_size()
        return type("Done", (), {"wait": lambda self: None})()

    def gather(out: torch.Tensor, x: torch.Tensor, group: Any = None) -> None:
        sent[now] += (group.size() - 1) * x.numel() * x.element_size()

    def scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
        mine = x.chunk(axis.size)[axis.index]
        sent[now] += (axis.size - 1) * mine.numel() * mine.element_size()
        return mine

    monkeypatch.setattr(parallel.context.dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(qwen_moe.sharding.context, "all_gather_single", gather)
    monkeypatch.setattr(qwen_moe.sharding.context, "reduce_scatter", scatter)
    config = parse_config(values(model(num_attention_heads=8, num_key_value_heads=2), 256), "test").model
    tokens, tp = 64, 2
    with fake_grids(Layout(cp=4, tp=tp), config.num_key_value_heads, 5, heads) as grids:
        attention = ContextAttention(kind, grids.cp_outer, grids.cp_heads)
        q, k, v = (
            torch.randn(3, tokens, n // tp, config.head_dim, dtype=torch.bfloat16, requires_grad=True)
            for n in (8, 2, 2)
        )
        y = attention(q, k, v, Visibility(), 0.1)
        now = "backward"
        y.sum().backward()
    predicted = traffic(config, 3 * tokens, tp, 4, ContextPlan(kind=kind, heads=heads))
    assert sent == {"forward": predicted.forward, "backward": predicted.backward}
    assert sent["forward"] > 0


def context_case(seed: int) -> tuple[RunConfig, Choice, RunLayout, int]:
    """(recipe, choice with cp of 2 to 8, its layout, processes): any kind, any length, with and without recomputation."""
    rng = random.Random(seed)
    gpus = rng.choice([8, 16, 32])
    config = parse_config(values(random_model(rng), rng.choice([256, 512, 1024]), global_batch_size=64), "test")
    width = config.model.moe_intermediate_size
    found = [
        (choice, layout)
        for choice, layout in legal_choices(config, gpus, (1, 2), least_tokens=1)
        if 2 <= choice.cp <= 8 and width // choice.etp % 8 == 0
    ]
    kind = rng.choice(sorted({(c.cp_kind, c.cp_ulysses > 1) for c, _ in found}))  # there are more rings than exchanges
    choice, layout = rng.choice([(c, f) for c, f in found if (c.cp_kind, c.cp_ulysses > 1) == kind])
    return config, choice, layout, gpus


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] * (s >= 5)) for s in range(BUILT)])
def test_activations_are_those_of_a_built_rank(seed: int) -> None:
    """A whole rank under FSDP2 with all its cp ranks, whereas plans take attention from short rings and the rest from layers
    without context parallelism."""
    config, choice, layout, gpus = context_case(seed)
    rank = random.Random(seed).randrange(gpus)
    predicted, found = predict(config, choice, layout, rank), counted(apply(config, choice), layout, choice, rank)
    assert predicted.activations == pytest.approx(found["activations"], rel=0.05)
    assert predicted.sharded_weights == found["sharded_weights"]
    assert predicted.optimizer == found["optimizer"]


def test_the_pairs_differ() -> None:
    cases = [context_case(seed)[1] for seed in range(BUILT)]
    assert {choice.cp for choice in cases} == {2, 4, 8}
    assert {choice.cp_kind for choice in cases} == {"ring", "all_gather", "ulysses"}
    assert {choice.recompute for choice in cases} == {"none", "full"}
    assert any(choice.cp_ulysses > 1 for choice in cases) and any(choice.tp > 1 for choice in cases)


def small(kind: str, ulysses: int, cp: int, recompute: str) -> RunConfig:
    recipe = values(model(num_hidden_layers=6), 512, global_batch_size=8, micro_batch_size=2, recompute=recompute)
    return parse_config(recipe | {"parallel": {"cp": cp, "cp_kind": kind, "cp_ulysses": ulysses}}, "test")


def _held(config: RunConfig) -> int:
    """What PyTorch's allocator has given for one forward on real tensors, and not got back."""
    from qwen_moe.sharding.build import build_model, make_grids

    gemm.has_hardware = lambda dtype: True  # type: ignore[assignment]
    device, layout = torch.device("cpu"), run_layout(config, dist.get_world_size())
    grids = make_grids(config, layout, device)
    (part,) = build_model(config, layout, grids, device).parts
    ids = torch.randint(0, config.model.vocab_size, (2, config.data.sequence_length // grids.cp.size))
    part(ids, ids).sum().backward()  # gradients exist, threads have started
    part.unshard()  # weights are gathered as in the next forward
    for layer in part.model.layers:
        layer.unshard()
        layer.mlp.experts.unshard()
    dist.Work.wait = _wait_and_let_go(dist.Work.wait)  # type: ignore[method-assign]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = part(ids, ids)
    del out
    return allocator_bytes(profile)


def _wait_and_let_go(wait: Callable[..., bool]) -> Callable[..., bool]:
    """Waits until gloo's thread has dropped the tensors of its message too. A tensor that this thread frees last is not in
    the profiler's record, and would count as held."""

    def settled(work: dist.Work, *timeout: Any) -> bool:
        done = wait(work, *timeout)
        time.sleep(0.005)
        return done

    return settled


@pytest.mark.parametrize(
    ("kind", "ulysses", "cp", "recompute"),
    [("ring", 1, 2, "none"), ("all_gather", 1, 2, "none"), ("ulysses", 1, 2, "full"), ("ring", 2, 4, "none")],
)
def test_activations_are_what_the_allocator_of_real_ranks_holds(
    kind: str, ulysses: int, cp: int, recompute: str
) -> None:
    config = small(kind, ulysses, cp, recompute)
    choice = Choice(cp=cp, cp_kind=kind, cp_ulysses=ulysses, micro_batch=2, recompute=recompute)
    predicted = MemoryModel(config).of_rank(choice, run_layout(config, cp), 0, Flight((0,), ((1.0,),)))
    for held in run_distributed(_held, cp, config):
        assert predicted.activations == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("context", [ContextPlan(kind="ring"), ContextPlan(kind="ring", heads=2)], ids=str)
def test_longer_rings_hold_no_more(context: ContextPlan) -> None:
    config = parse_config(values(model(**WIDE), 512), "test")
    split = Split(cp=8, context=context)
    whole = count(config, Run(split=split, given=64, layers=(1,), middle=True))
    found = SavedActivations(config).layer(split, True)
    assert found.working == whole.working
    assert found.held + SavedActivations(config).shared(split) == whole.held


def test_gathered_keys_count_as_working_memory() -> None:
    config = parse_config(values(model(**WIDE), 1024), "test")
    saved = SavedActivations(config)
    ring, gathered = (
        saved.layer(Split(cp=16, context=ContextPlan(kind=kind)), True)
        for kind in ("ring", "all_gather")  # type: ignore[arg-type]
    )
    assert ring.held == gathered.held
    keys_and_gradients = 2 * 8 * 128 * 1024 * (2 + 4)
    assert keys_and_gradients < gathered.working < 4 * keys_and_gradients
    assert ring.working < gathered.working / 2


def test_long_sequences_are_counted_from_others() -> None:
    """A layer to the byte, and what the head's stage holds."""
    config = parse_config(values(model(max_position_embeddings=65536), 65536), "test")
    saved, split = SavedActivations(config), Split()
    for recompute in (False, True):
        run = Run(given=65536, layers=(2,), recompute=recompute)
        whole, layer = count(config, replace(run, middle=True)), saved.layer(split, True, recompute=recompute)
        assert layer.held + saved.shared(split) == whole.held
        if not recompute:
            assert layer.working == whole.working
            last, head = count(config, run), saved.last(split)
            assert layer.held + saved.shared(split) + head.held == last.held
            # The head has freed some of its bytes before the layer's backward, so too much is found.
            assert 0.99 * last.working < max(layer.working, head.working) < 1.25 * last.working


def times(gpus_per_node: int = 8, sequence: int = 65536, **shapes: Any) -> StepTimeModel:
    recipe = values({"preset": "qwen3-30b-a3b", "max_position_embeddings": sequence} | shapes, sequence)
    cluster = Cluster(load_gpu("h100-80gb"), load_network("ib400"), gpus_per_node)
    return StepTimeModel(parse_config(recipe, "test").model, sequence, cluster, OURS)


def seconds(model: StepTimeModel, kind: Any, cp: int, heads: int = 1, tp: int = 1) -> float:
    return model.context_seconds(Choice(tp=tp, cp=cp), ContextPlan(kind=kind, heads=heads))


def test_kinds_cost_what_their_links_do() -> None:
    inside, across = times(), times(gpus_per_node=4)
    for kind, heads in (("ring", 1), ("all_gather", 1), ("all_gather", 8)):
        assert seconds(across, kind, 8, heads) > seconds(inside, kind, 8, heads)
        assert seconds(across, kind, 4, min(heads, 4)) == seconds(inside, kind, 4, min(heads, 4))
    # Between nodes each message of a ring has one adapter: exchange heads within the node, so that there are fewer.
    assert seconds(inside, "ring", 32, 4) < seconds(inside, "ring", 32)
    # tp ranks lie inside cp ranks, so with them the ring leaves the node.
    assert seconds(inside, "ring", 8, tp=2) > seconds(times(gpus_per_node=16), "ring", 8, tp=2)


def test_a_ring_hides_behind_long_sequences() -> None:
    """Work grows with the square of the length, messages with the length: their exposed share falls to the gradients' last
    turn and what never hides."""
    rates = Rates(Cluster(load_gpu("h100-80gb"), load_network("ib400"), 8), OURS)
    shares = []
    for sequence in (32768, 262144, 2097152):
        model = times(sequence=sequence)
        choice = Choice(cp=16)
        cost = ContextTime(model.model, sequence, rates).cost(choice, ContextPlan(kind="ring"), model._scores(choice))
        shares.append((cost.exposed_forward + cost.exposed_backward) / sequence)
    assert shares[0] > 1.5 * shares[1] >= shares[2] * 1.5


def test_recomputation_repeats_forwards_messages() -> None:
    model = times(gpus_per_node=1)
    plain, again = (
        model.layer(Choice(cp=4, recompute=recompute), True, ContextPlan(kind="all_gather")).cp
        for recompute in ("none", "full")
    )
    cost = model.context.cost(Choice(cp=4), ContextPlan(kind="all_gather"), 0.0)
    assert again - plain == pytest.approx(cost.exposed_forward + cost.copies / 3)


def test_every_kind_of_a_layout_is_legal_and_no_other() -> None:
    config = parse_config(values({"preset": "turbo_style"}, 8192), "test")  # 16 heads, 8 of keys
    found = {(kind.cp_kind, kind.cp_ulysses) for kind in kinds(config, Layout(cp=8, tp=2))}
    assert found == {("ring", 1), ("all_gather", 1), ("ulysses", 1), ("ring", 2), ("all_gather", 2), ("ring", 4),
                     ("all_gather", 4)}  # fmt: skip
    found = {(kind.cp_kind, kind.cp_ulysses) for kind in kinds(config, Layout(cp=8, tp=8))}  # 2 heads on a rank
    assert found == {("ring", 1), ("all_gather", 1), ("ring", 2), ("all_gather", 2)}


def test_short_sequences_are_not_cut() -> None:
    recipe = values({"preset": "demo", "num_hidden_layers": 4}, 512, global_batch_size=16)
    assert {c.cp for c, _ in legal_choices(parse_config(recipe, "test"), 8)} == {1}
    asked = parse_config(recipe | {"parallel": {"cp": 4}}, "test")
    assert {c.cp for c, _ in legal_choices(asked, 8)} == {1, 4}  # the recipe's own


def test_a_long_sequence_gets_context_parallelism(capsys: pytest.CaptureFixture[str]) -> None:
    """Two sequences for 8 GPUs: something must cut them. Every kind is compared with the best, which is the fastest."""
    from qwen_moe.planning.text import plan_text

    shapes = {"preset": "demo", "num_hidden_layers": 2, "max_position_embeddings": 32768}
    config = parse_config(values(shapes, 32768, global_batch_size=2), "test")
    cluster = Cluster(load_gpu("h100-80gb"), load_network("ib400"), 8)
    plan = Search(config, 8, cluster, precisions=("bf16",)).run(1)
    best = plan.best[0]
    assert best.choice.cp > 1 and best.step.cp > 0
    assert plan.kinds[0].choice == best.choice and len(plan.kinds) >= 3
    assert [one.step.total for one in plan.kinds] == sorted(one.step.total for one in plan.kinds)
    text = plan_text(plan, "recipe.yaml")
    assert f"cp={best.choice.cp}" in text and "MiB in forward" in text and "1.000 times the step" in text
    assert best.facts()["cp_bytes_per_layer"]["forward"] == best.traffic.forward > 0
    run_layout(apply(config, best.choice), 8)


def test_the_kind_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over the recipe's own, which is for another cp."""
    shapes = {"preset": "demo", "num_hidden_layers": 2, "max_position_embeddings": 32768}
    recipe = values(shapes, 32768, global_batch_size=2) | {"parallel": {"cp": 4, "cp_kind": "ring", "cp_ulysses": 2}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(path), "--gpus", "8", "--top", "1", "--precision", "bf16", "--json", "--write"]) == 0
    best, written = json.loads(capsys.readouterr().out)["best"][0], load_config(path).parallel
    assert best["cp"] > 1 and (best["cp_kind"], best["cp_ulysses"]) != ("ring", 2)
    assert (written.cp, written.cp_kind, written.cp_ulysses) == (best["cp"], best["cp_kind"], best["cp_ulysses"])


def test_a_kind_that_does_not_fit_becomes_a_ring() -> None:
    shapes = {"preset": "demo", "num_hidden_layers": 2, "max_position_embeddings": 32768}
    config = parse_config(values(shapes, 32768, global_batch_size=2), "test")
    cluster = Cluster(load_gpu("h100-80gb"), load_network("ib400"), 8)
    search = Search(config, 8, cluster, precisions=("bf16",))
    choice = Choice(cp=4, cp_kind="ulysses")
    layout = run_layout(apply(config, choice), 8)
    leaner = search._as_ring(choice, layout)
    assert leaner is not None and leaner[1] == replace(choice, cp_kind="ring")
    assert leaner[2] == run_layout(apply(config, leaner[1]), 8)
    assert search.memory.fullest(leaner[1], leaner[2]).total < search.memory.fullest(choice, layout).total
    assert search._as_ring(leaner[1], leaner[2]) is None


def test_flops_do_not_depend_on_cp() -> None:
    model = times()
    work = flops_per_token(model.model, 65536)
    assert model.flops() == work.training
    one, eight = (model.layer(Choice(cp=cp), True, ContextPlan()).compute for cp in (1, 8))
    assert one > 7 * eight
