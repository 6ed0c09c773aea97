"""Generation in tensor, expert, pipeline and data parallel layouts draws the tokens of one process, by the same experts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Grids, Layout
from qwen_moe.checkpoint.tensor_store import ModuleTensors
from qwen_moe.config import ModelConfig
from qwen_moe.generation.engine import Engine, Limits
from qwen_moe.generation.ranks import ShardedRunner, gather_shares, load_sharded
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights
from tests.small import small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4], [7, 7], [3, 1, 4, 1, 5]]
SAMPLING = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, samples=2, repetition_penalty=1.1, seed=3)
ENDS = [2, 11]


def config(dense: list[int]) -> ModelConfig:
    return small_model(max_position_embeddings=64, num_hidden_layers=3, vocab_size=61, mlp_only_layers=dense)


def one_process(dense: list[int], routing: bool) -> list[Any]:
    engine = Engine(LocalRunner(draw_weights(config(dense), 4).eval()), config(dense), end_tokens=ENDS)
    return engine.generate(PROMPTS, SAMPLING, routing=routing)


def _generate(layout: Layout, dense: list[int], routing: bool) -> list[Any]:
    shape = config(dense)
    grids = Grids(layout, "cpu", kv_heads=shape.num_key_value_heads)
    source = ModuleTensors(draw_weights(shape, 4))
    model = load_sharded(shape, source, grids, torch.float64, torch.device("cpu"), "the test")
    runner = ShardedRunner(model, grids, torch.device("cpu"))
    engine = Engine(runner, shape, end_tokens=ENDS, limits=Limits(chunk=7, sequences=4))
    numbers = runner.share_of(range(len(PROMPTS)))
    answers = engine.generate([PROMPTS[i] for i in numbers], SAMPLING, numbers=numbers, routing=routing)
    dist.barrier()
    return gather_shares(answers, grids, len(PROMPTS))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2),
        Layout(pp=2),
        Layout(dp=2, ep=2),
        Layout(tp=4, ep=2, etp=2),
        Layout(pp=3, tp=2, ep=2),
        Layout(dp=4, ep=2),
        Layout(dp=2, tp=2, pp=2, ep=2),
    ],
    ids=str,
)
def test_layouts_draw_what_one_process_draws(layout: Layout) -> None:
    equal_one_process(layout, [], routing=True)


def test_a_stage_without_experts() -> None:
    equal_one_process(Layout(pp=3, tp=2), [1], routing=True)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
def test_layouts_draw_the_same_without_routing(layout: Layout) -> None:
    equal_one_process(layout, [], routing=False)


def equal_one_process(layout: Layout, dense: list[int], routing: bool) -> None:
    expected = one_process(dense, routing)
    for found in run_distributed(_generate, layout.world_size, layout, dense, routing):
        assert [[a.tokens for a in x] for x in found] == [[a.tokens for a in x] for x in expected]
        for theirs, ours in zip(expected, found, strict=True):
            for a, b in zip(theirs, ours, strict=True):
                assert a.finish_reason == b.finish_reason
                assert (b.routing is not None) == routing
                if routing:
                    assert torch.equal(a.routing.whole(), b.routing.whole())
                torch.testing.assert_close(torch.tensor(a.log_probs), torch.tensor(b.log_probs), rtol=0, atol=1e-10)
