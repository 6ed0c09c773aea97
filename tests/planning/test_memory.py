"""Predicted bytes against bytes counted in built ranks under FSDP2, and against the allocator's own record."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor

from parallel import gemm
from parallel.data import local
from parallel.stages import V_SHAPED, stages_of_rank
from parallel.timeline import play
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.planning import counting
from qwen_moe.planning.counting import Run, Split, count, fake_grids
from qwen_moe.planning.layouts import Choice, apply, legal_choices
from qwen_moe.planning.live_bytes import LiveBytes
from qwen_moe.planning.memory import Memory, MemoryModel
from qwen_moe.planning.saved import SavedActivations
from qwen_moe.planning.schedules import Flight, _flights, enough, flights, idle_micro_batches
from qwen_moe.planning.shares import place_of
from qwen_moe.sharding.build import build_model, shard_model
from qwen_moe.sharding.layout import RunLayout, run_layout
from qwen_moe.sharding.model import ParallelModel
from qwen_moe.training.optimizer import build_optimizer
from tests.planning.recipes import random_case, values
from tests.schedules import needs

PAIRS = 40


def bytes_of(tensor: torch.Tensor) -> int:
    tensor = local(tensor)
    return tensor.numel() * tensor.element_size()


def one_each(choice: Choice, layout: RunLayout, rank: int) -> Flight:
    """One micro-batch in flight through each stage of a rank."""
    stages = [0]
    if choice.pp > 1:
        stages = stages_of_rank(choice.schedule, choice.pp, layout.per_rank, rank // layout.layout.stage_size)
    return Flight(tuple(stages), ((1.0,) * len(stages),))


def accumulated(model: ParallelModel) -> int:
    """Bytes of unsharded gradients that FSDP2 holds between micro-batches, in its own record."""
    return sum(
        parameter.unsharded_accumulated_grad.numel() * parameter.unsharded_accumulated_grad.element_size()
        for part in model.parts
        for state in fully_shard.state(part)._state_ctx.all_states  # type: ignore[attr-defined]
        for group in (getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)])
        if group is not None  # torch 2.11 has one or none, and 2.13 a list
        for parameter in group.fsdp_params
        if parameter.unsharded_accumulated_grad is not None
    )


def counted(config: RunConfig, layout: RunLayout, choice: Choice, rank: int) -> dict[str, int]:
    """Build one rank on shapes, run a micro-batch through each of its stages, and look at what is there."""
    found: dict[str, int] = {}
    given = config.data.sequence_length // choice.cp
    with fake_grids(layout.layout, config.model.num_key_value_heads, rank, layout.context.heads) as grids:
        model = shard_model(config, layout, grids)
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(peaks=False) as live:
            for part in model.parts:
                part.to_empty(device="cpu")
            model.kernels.materialize(torch.device("cpu"))
            found["sharded_weights"] = sum(bytes_of(p) for p in model.parameters())
            ids = torch.zeros(choice.micro_batch, given, dtype=torch.int64)
            shape = (choice.micro_batch, given // grids.tp.size, config.model.hidden_size)
            hidden = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
            before, outs = live.live, []
            for part in model.parts:
                part.set_requires_gradient_sync(False)
                outs.append(part(ids if part.first else hidden, ids))
            for part in model.parts:  # the last unit's all-gather, which is a buffer
                fully_shard.state(part)._comm_ctx.all_gather_state = None  # type: ignore[attr-defined]
            whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
            found["gathered_weights"] = sum(p.untyped_storage().nbytes() for p in whole)
            found["activations"] = live.live - before - found["gathered_weights"]
            for out in outs:
                out.sum().backward()
            found["gradients"] = accumulated(model)
            model.reshard()
            for part in model.parts:
                part.set_requires_gradient_sync(True)
                part(ids if part.first else hidden, ids).sum().backward()
            found["sharded_gradients"] = sum(bytes_of(p.grad) for p in model.parameters() if p.grad is not None)
            optimizer = build_optimizer(model, config.optimizer)
            optimizer.step()
            found["optimizer"] = sum(bytes_of(t) for state in optimizer.state.values() for t in state.values())
    return found


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 8)) for seed in range(PAIRS)])
def test_predicted_bytes_are_those_of_a_built_rank(seed: int) -> None:
    rng = random.Random(seed)
    config, choice, layout, gpus = random_case(rng)
    rank = rng.randrange(gpus)
    predicted = predict(config, choice, layout, rank)
    found = counted(apply(config, choice), layout, choice, rank)
    assert predicted.sharded_weights == found["sharded_weights"]
    assert predicted.sharded_gradients == found["sharded_gradients"]
    assert predicted.optimizer == found["optimizer"]
    if layout.micro_batches > 1:
        assert predicted.gradients == max(found["gradients"], found["sharded_gradients"])
    if choice.sharding == "zero2" and choice.precision != "fp8":  # which keeps weights within a step besides
        assert predicted.gathered_weights == found["gathered_weights"]
    # The gathered root of zero3 stays, the other units do not; they are seen as weights above either way.
    assert predicted.activations == pytest.approx(found["activations"], rel=0.05)


def predict(config: RunConfig, choice: Choice, layout: RunLayout, rank: int) -> Memory:
    flight = one_each(choice, layout, rank)
    place = place_of(layout.layout, rank)
    return MemoryModel(config).of_rank(choice, layout, rank // layout.layout.stage_size, flight, place)


def small(**parallel: int) -> RunConfig:
    model = {"preset": "demo", "num_hidden_layers": 3, "tie_word_embeddings": False}
    return parse_config(values(model, 256, global_batch_size=8, micro_batch_size=2) | {"parallel": parallel}, "test")


def allocator_bytes(profile: torch.profiler.profile) -> int:
    """Allocated and not freed while ``profile`` recorded, by PyTorch's allocator itself."""
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_activations_are_what_the_allocator_holds(
    monkeypatch: pytest.MonkeyPatch, recompute: str, micro_batch: int
) -> None:
    """Real tensors, a real forward: the allocator's record, not our counter's. Plans are for hardware that multiplies
    bfloat16; without it, attention saves its operands in float32."""
    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: True)
    config = small()
    model = DecoderLM(config.model, recompute=recompute).to(torch.bfloat16)
    ids = torch.randint(0, config.model.vocab_size, (micro_batch, 256))
    model.loss_sums(ids, ids).cross_entropy.backward()  # gradients exist, threads have started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sums = model.loss_sums(ids, ids)
    held = allocator_bytes(profile)
    del sums
    choice = Choice(micro_batch=micro_batch, recompute=recompute)
    layout = run_layout(small(), 1)
    predicted = MemoryModel(config).of_rank(choice, layout, 0, Flight((0,), ((1.0,),)))
    assert predicted.activations == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("layers", [(1,), (2,)], ids=["in the middle", "with the head"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_is_held_between_the_halves_of_a_backward(
    monkeypatch: pytest.MonkeyPatch, recompute: str, layers: tuple[int, ...]
) -> None:
    """Real tensors, torch's own first half: the allocator's record of what is left for the second."""
    needs("zbv")
    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: True)
    config = small()
    model = DecoderLM(config.model, recompute=recompute, layers=layers).to(torch.bfloat16)
    model.backward_in_halves = True
    weights, head = list(model.parameters()), layers == (2,)
    ids = torch.randint(0, config.model.vocab_size, (1, 256))

    def forward(x: torch.Tensor) -> torch.Tensor:
        if head:
            return model.loss_sums(x, ids).cross_entropy
        return model.hidden_states(x)[0]

    def halves(x: torch.Tensor) -> tuple[int, int]:
        """Bytes after forward, and between the halves."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = forward(x)
        held = allocator_bytes(profile)
        given = None if head else [torch.ones_like(out)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _, groups = stage_backward_input([out], given, [x], iter(weights))
            x.grad = _ = None  # the stage before gets it
            del out
        between = held + allocator_bytes(profile)
        stage_backward_weight(iter(weights), groups)
        return held, between

    x = torch.randn(1, 256, config.model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    halves(x)  # gradients exist, threads have started
    held, between = halves(x)
    choice = Choice(micro_batch=1, recompute=recompute, pp=3, schedule="zbv")
    predicted = MemoryModel(config)._count_stage(choice, Split(), {True: 1}, False, head)
    assert predicted.held == pytest.approx(held, rel=0.05)
    assert predicted.held + predicted.between == pytest.approx(between, rel=0.05)


def test_the_log_probability_head_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an objective that needs it, what the allocator holds is predicted too."""
    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: True)
    config = small()
    model = DecoderLM(config.model).to(torch.bfloat16)
    ids = torch.randint(0, config.model.vocab_size, (2, 256))

    def log_probs() -> torch.Tensor:
        x, _ = model.hidden_states(ids)
        return model.log_probs(x, model.head_weight, ids, config.training.loss_chunk_tokens)

    log_probs().sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = log_probs()
    held = allocator_bytes(profile)
    del out
    choice, layout, flight = Choice(micro_batch=2), run_layout(config, 1), Flight((0,), ((1.0,),))
    cross_entropy = MemoryModel(config).of_rank(choice, layout, 0, flight).activations
    monkeypatch.setattr(counting, "build_objective", lambda objective: SimpleNamespace(head="log_probs"))
    predicted = MemoryModel(config).of_rank(choice, layout, 0, flight).activations
    assert predicted == pytest.approx(held, rel=0.02)
    assert abs(predicted - cross_entropy) > 0.05 * held  # whose gradient is formed in forward


def test_a_whole_step_peaks_where_predicted() -> None:
    """Everything together, with real tensors in one process: weights, gradients, activations and working memory of a
    step of two micro-batches."""
    config = small()
    choice = Choice(micro_batch=2)
    layout = run_layout(config, 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        from qwen_moe.sharding.build import make_grids

        device = torch.device("cpu")
        grids = make_grids(config, layout, device)
        with LiveBytes() as live:
            model = build_model(config, layout, grids, device)
            (part,) = model.parts
            ids = torch.randint(0, config.model.vocab_size, (2, 256))
            before = live.live
            live.reset_peak()
            for last in (False, True):
                part.set_requires_gradient_sync(last)
                part(ids, ids).sum().backward()
            peak = live.peak - before
    finally:
        dist.destroy_process_group()
    memory = MemoryModel(config).of_rank(choice, layout, 0, Flight((0,), ((1.0,),)))
    assert memory.total - memory.sharded_weights - memory.optimizer == pytest.approx(peak, rel=0.10)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_halves_need_the_gradients_of_one_more_unit(recompute: str) -> None:
    """Real tensors in one process, so few tokens that weights need most: what a micro-batch holds for backward stays the
    same when its halves take turns. In float32: a CPU without bf16 instructions needs more for bf16."""
    config = small()
    model = DecoderLM(config.model, recompute=recompute)
    ids = torch.randint(0, config.model.vocab_size, (2, 16))
    model.loss_sums(ids, ids).cross_entropy.backward()
    held, peaks = [], []
    for model.ep_overlap in (False, True):
        with LiveBytes() as live:
            x, _ = model.hidden_states(ids)
            held.append(live.live)
            x.sum().backward()
        peaks.append(live.peak)
    assert held[1] == pytest.approx(held[0], rel=0.05)
    choice, layout = Choice(ep=2, micro_batch=2, recompute=recompute), run_layout(small(ep=2), 2)
    plain, halves = (
        MemoryModel(config).of_rank(replace(choice, ep_overlap=on), layout, 0, Flight((0,), ((1.0,),)))
        for on in (False, True)
    )
    more = halves.working - plain.working
    experts = next(layer.mlp.experts for layer in model.model.layers if layer.is_moe)
    assert more == sum(p.numel() * 2 for p in experts.parameters()) / 2  # this rank has half of the experts
    assert 2 * more < peaks[1] - peaks[0] < 2 * 2 * more * 1.1  # float32 of bf16, all of half of the experts


def test_other_expert_parallel_degrees_hold_the_same() -> None:
    """What is taken for one number of ranks that share experts is what counting another gives."""
    config = small()
    found = SavedActivations(config)
    for ep, etp in ((2, 4), (8, 1), (1, 4)):
        split = Split(ep=ep, etp=etp)
        whole = count(config, Run(split=split, given=256, layers=(1,), middle=True, forward_only=True))
        assert found.layer(split, True).held + found.shared(split) == pytest.approx(whole.held, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "pp", "micro_batches", "per_rank"),
    [
        *(("1f1b", 4, 16, 1), ("1f1b", 4, 4, 1), ("interleaved_1f1b", 4, 16, 2), ("interleaved_1f1b", 2, 8, 4)),
        *(("zbv", 4, 12, 2), ("zbv", 2, 6, 2), ("dualpipev", 4, 12, 2)),
    ],
)
def test_micro_batches_in_flight_are_those_of_the_timeline(
    schedule: str, pp: int, micro_batches: int, per_rank: int
) -> None:
    peaks = play(schedule, pp, micro_batches, per_rank).peak
    for flight, peak in zip(flights(schedule, pp, micro_batches, per_rank), peaks, strict=True):
        assert max(map(sum, flight.moments)) / per_rank == pytest.approx(peak)
        assert bool(flight.halved) == (schedule in V_SHAPED)
        assert all(h <= n for at in zip(flight.moments, flight.halved) for n, h in zip(*at, strict=True))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv", "dualpipev"])
def test_more_rounds_change_neither_flight_nor_idle_time(schedule: str) -> None:
    """What is played is two rounds; ten of them are the same."""
    per_rank = {"1f1b": 1, "interleaved_1f1b": 3}.get(schedule, 2)
    idle = play(schedule, 4, 40, per_rank).length / 3 - 40
    assert idle_micro_batches(schedule, 4, 40, per_rank) == pytest.approx(idle)
    if schedule == "1f1b":
        assert idle == pytest.approx(3)  # pp - 1, arXiv 2104.04473
    peaks = play(schedule, 4, 40, per_rank).peak
    if schedule in ("1f1b", "interleaved_1f1b"):
        assert [max(map(sum, f.moments)) / per_rank for f in flights(schedule, 4, 40, per_rank)] == pytest.approx(peaks)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
@pytest.mark.parametrize("pp", [3, 4])
def test_rounds_with_a_rest_are_played_with_that_rest(schedule: str, pp: int) -> None:
    """Of a thousand micro-batches, of which pp is no divisor, torch would need seconds to make the actions."""
    per_rank = 1 if schedule == "1f1b" else 2
    for micro_batches in range(2 * pp, 5 * pp):
        assert enough(schedule, pp, micro_batches) < 3 * pp
        assert flights(schedule, pp, micro_batches, per_rank) == _flights(schedule, pp, micro_batches, per_rank)
        idle = play(schedule, pp, micro_batches, per_rank).length / 3 - micro_batches
        assert idle_micro_batches(schedule, pp, micro_batches, per_rank) == pytest.approx(idle)
    assert enough("interleaved_1f1b", pp, 10 * pp + 1) == 10 * pp + 1  # one round of them all, or a few long ones


def test_the_fullest_rank_is_the_fullest_of_all() -> None:
    """Built rank by rank, none holds more weights, gradients and optimizer state than the one that is reported."""
    config = parse_config(values({"preset": "demo", "num_hidden_layers": 4}, 256, global_batch_size=32), "test")
    choice, layout = next(
        (c, found) for c, found in legal_choices(config, 8) if (c.tp, c.pp, c.ep, c.micro_batch) == (2, 2, 2, 1)
    )
    model = MemoryModel(config)
    most = model.fullest(choice, layout)
    per_rank = flights(choice.schedule, choice.pp, layout.micro_batches, layout.per_rank)
    totals = [
        model.of_rank(choice, layout, r // 4, per_rank[r // 4], place_of(layout.layout, r)).total for r in range(8)
    ]
    assert most.total == max(totals)
    assert model.of_rank(replace(choice, recompute="full"), layout, 0, per_rank[0]).activations < most.activations


@pytest.mark.parametrize("gpus", [1, 8])
def test_the_frozen_reference_is_counted_where_there_is_one(gpus: int) -> None:
    def planned(**policy: object) -> Memory:
        recipe = values({"preset": "demo"}, sequence=256, global_batch_size=8, train_tokens=0)
        recipe["training"].pop("train_tokens")
        recipe["objective"] = {"kind": "grpo", "policy": policy}
        recipe["rollout"] = {
            "queries": ["tasks:sort:100"],
            "episodes": 2,
            "queries_per_episode": 8,
            "rewards": ["exact"],
        }
        recipe["data"] = {"tokenizer": "unused", "sequence_length": 256}
        config = parse_config(recipe, "test")
        choice, layout = next(iter(legal_choices(config, gpus, (1,))))
        return MemoryModel(config).fullest(choice, layout)

    without, held = planned(), planned(kl="rho_k3", kl_coefficient=0.1)
    assert held.reference == held.sharded_weights > 0 == without.reference
    assert held.total == without.total + held.reference
