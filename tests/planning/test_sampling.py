"""What `plan` says of sampling, against caches that the sampler really allocates and against times computed by hand."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.generation.cache import _Store
from qwen_moe.generation.engine import Engine, Limits, batches
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling
from qwen_moe.planning.hardware import Cluster, load_gpu, load_network
from qwen_moe.planning.layouts import legal_choices
from qwen_moe.planning.memory import MemoryModel
from qwen_moe.planning.sampling import SamplingModel, Workload, cache_bytes
from qwen_moe.planning.schedules import flights
from qwen_moe.planning.search import Search
from qwen_moe.planning.software import OURS
from qwen_moe.planning.step_time import StepTimeModel
from qwen_moe.planning.text import plan_text
from tests.models.hf_reference import draw_weights
from tests.planning.recipes import values
from tests.small import model_values

ROLLOUT: dict[str, Any] = {
    "queries": ["tasks:sort:100"],
    "rewards": ["exact"],
    "episodes": 2,
    "queries_per_episode": 16,
    "samples": 4,
    "updates_per_episode": 2,
    "max_new_tokens": 24,
    "batch": 12,
}
CLUSTER = Cluster(load_gpu("h100-80gb"), load_network("ib400"), 8)


def recipe(model: dict[str, Any], policy: dict[str, Any] | None = None, **rollout: Any) -> RunConfig:
    """32 answers of an update in 8 rows of 256 tokens: 64 for each."""
    found = values(model, sequence=256, global_batch_size=8, train_tokens=0)
    found["training"].pop("train_tokens")
    found["objective"] = {"kind": "grpo", "policy": policy or {}}
    found["rollout"] = ROLLOUT | rollout
    found["data"] = {"tokenizer": "unused", "sequence_length": 256}
    return parse_config(found, "test")


def planned(config: RunConfig, gpus: int, **degrees: int) -> tuple[Any, Any]:
    return next(
        (choice, layout)
        for choice, layout in legal_choices(config, gpus, (1,), ("bf16",))
        if all(getattr(choice, name) == size for name, size in degrees.items())
    )


def test_a_workload_is_what_the_sampler_makes_batches_of() -> None:
    config = recipe(model_values("qwen2_moe", max_position_embeddings=64))
    work = Workload.of(config, 2)
    assert work == Workload(prompts=8, samples=4, prompt_tokens=40, new_tokens=24, at_once=3)
    sampling = Sampling(samples=4, max_new_tokens=24)
    found = batches([40] * 8, sampling, Limits(sequences=12))
    assert work.batches == len(found) == 3 and max(map(len, found)) == work.at_once


def test_the_cache_is_what_the_sampler_allocates() -> None:
    config = recipe(model_values("qwen2_moe", max_position_embeddings=64))
    choice, layout = planned(config, 1)
    work = Workload.of(config, 1)
    model = draw_weights(config.model, 3, torch.float32).to(torch.bfloat16)
    held: list[int] = []

    def count(read: int, drawn: int) -> None:
        # What the batch holds is only reachable by its frame: count all stores that are alive.
        stores = [one for one in gc.get_objects() if type(one) is _Store]
        held.append(sum(x.numel() for store in stores for pair in store.layers.values() for x in pair))

    engine = Engine(LocalRunner(model), config.model, limits=Limits(sequences=12))
    engine.generate([[5] * 40] * 3, Sampling(samples=4, max_new_tokens=24, temperature=1, top_p=1), progress=count)
    # bf16 has two bytes; on CPUs without its instructions the store is wider, so elements are compared.
    assert max(held) * 2 == cache_bytes(config, choice, 1, config.model.num_hidden_layers)
    fullest = MemoryModel(config).fullest(choice, layout)
    assert fullest.cache == max(held) * 2 and work.at_once == 3


def test_a_rank_holds_its_weights_its_states_and_its_cache() -> None:
    config = recipe({"preset": "demo"}, {"kl": "rho_k3", "kl_coefficient": 0.1})
    choice, layout = planned(config, 4, pp=2, tp=1, ep=2)
    model = MemoryModel(config)
    per_rank = flights(choice.schedule, choice.pp, layout.micro_batches, layout.per_rank)
    for rank, flight in enumerate(per_rank):
        found = model.of_rank(choice, layout, rank, flight)
        m, layers = config.model, sum(len(layout.layers[stage]) for stage in flight.stages)
        # 8 queries of a group, 3 at once: keys and values of 3 prompts of 40 tokens and 12 answers of 24, in bf16.
        assert found.cache == 2 * 2 * m.num_key_value_heads * m.head_dim * layers * (3 * 40 + 12 * 24)
        states = found.sharded_weights + found.optimizer + found.reference
        whole = replace(choice, sharding="zero2")
        assert found.sampling == states + model.of_rank(whole, layout, rank, flight).gathered_weights + found.cache
        step = found.weights + found.gradients + found.optimizer + found.reference
        step += found.activations + found.working + found.buffers
        assert found.total == step > found.sampling
    longer = recipe({"preset": "demo"}, max_new_tokens=4000, queries_per_episode=1024, batch=4096, samples=8)
    fullest = MemoryModel(longer).fullest(choice, layout)
    assert fullest.total == fullest.sampling > fullest.cache > 0


def dense_model() -> dict[str, Any]:
    return {
        "family": "qwen3", "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip


def test_the_time_of_a_dense_model_is_that_computed_by_hand() -> None:
    config = recipe(dense_model())
    choice, layout = planned(config, 1)
    time = SamplingModel(config, StepTimeModel(config.model, 256, CLUSTER, OURS)).of_episode(choice, layout)
    assert time is not None
    memory, flops = 3350e9 * 0.76, 989.4e12 * 0.74
    attention = 512 * 64 * (8 + 2 + 2) + 8 * 64 * 512 + 2 * 64  # q, k and v; the output; norms of q and k
    layer = attention + 3 * 512 * 1024 + 2 * 512
    tokens = 6 * 24  # 16 prompts in batches of 3, each answered by 4 in 24 steps
    weights = 4 * 2 * layer / memory + 2 * 512 * 1000 / memory + 12 * 1000 * 50 / memory
    assert time.weights == pytest.approx(tokens * weights, rel=1e-12)
    # A prompt's keys and values are read once for its answers, each answer's own on average 12.5 tokens.
    cache = 4 * (2 * 2 * 2 * 64) * (3 * 40 + 12 * 12.5) / memory
    assert time.cache == pytest.approx(tokens * cache, rel=1e-12)
    launched = 4 * 110 / 3 * 4.5e-6
    assert time.kernels == pytest.approx(tokens * (launched - 4 * 2 * layer / memory - cache), rel=1e-12)
    assert time.exchange == 0
    scores = 4 * 4 * 8 * 64 * 41 / 2
    linear = 2 * 4 * (512 * 64 * 12 + 8 * 64 * 512 + 3 * 512 * 1024)
    assert time.prompts == pytest.approx(16 * 40 * (linear + scores) / flops, rel=1e-12)


def test_experts_are_read_as_far_as_answers_take_them() -> None:
    """With one answer a batch a token reads its own experts; with many, all of them."""
    config = recipe({"preset": "demo"}, batch=2, samples=2, queries_per_episode=16)
    many = recipe({"preset": "demo"}, batch=4096, samples=512, queries_per_episode=16)
    choice, layout = planned(config, 1)
    model = config.model
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    for one, answers in ((config, 2), (many, 4096)):
        found = SamplingModel(one, StepTimeModel(model, 256, CLUSTER, OURS))
        work = Workload.of(one, 1)
        assert work.answers == answers
        weights, *_ = found._layer(choice, layout, work, True)
        dense = found.time.shares.layer(layout.layout, True)[0].whole
        met = model.num_experts * (1 - (1 - model.num_experts_per_tok / model.num_experts) ** answers)
        wide = 2 * answers / found._flops
        expected = max(2 * dense / found.time.rates.memory, wide * dense)
        expected += max(2 * met * expert / found.time.rates.memory, wide * model.num_experts_per_tok * expert)
        assert weights == pytest.approx(expected, rel=1e-12)


def test_a_plan_counts_it_and_says_so() -> None:
    config = recipe({"preset": "demo"}, {"kl": "k2", "kl_coefficient": 0.1})
    plan = Search(config, 2, CLUSTER, precisions=("bf16",)).run(1)
    best = plan.best[0]
    assert best.sampling is not None and best.step.sampling == best.sampling.total / 2
    alone = StepTimeModel(config.model, 256, CLUSTER, OURS).step(best.choice, best.layout)
    forward = (alone.total - alone.dp - alone.optimizer) / (4 if best.choice.recompute == "full" else 3)
    assert best.step.preparing == pytest.approx(2 * forward, rel=1e-12)
    assert best.step.total == pytest.approx(alone.total + best.step.sampling + best.step.preparing, rel=1e-12)
    text = plan_text(plan, "test")
    assert "s an episode if all answers are 24 tokens long" in text and "sampling " in text and "preparing " in text
    assert "answers with prompts of up to 40 tokens" in text and "rewards are not in these figures" in text
    assert best.facts()["sampling_seconds"]["total"] == best.sampling.total


def test_a_server_samples_on_other_machines() -> None:
    server = {"url": "http://other", "model": "ours", "kind": "sglang"}
    config = recipe({"preset": "demo"}, replay=False, server=server)
    plan = Search(config, 2, CLUSTER, precisions=("bf16",)).run(1)
    best = plan.best[0]
    assert best.sampling is None and best.step.sampling == best.memory.cache == best.memory.sampling == 0
    assert best.step.preparing > 0 and "nor is the server that samples" in plan_text(plan, "test")
