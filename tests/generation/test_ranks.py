"""Generation in tensor, expert, pipeline and data parallel layouts draws the tokens of one process, by the same experts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Grids, Layout
from qwen_moe.checkpoint.tensor_store import ModuleTensors
from qwen_moe.config import DualChunk, ModelConfig
from qwen_moe.generation.engine import Engine, Limits
from qwen_moe.generation.likelihood import ScoredText
from qwen_moe.generation.ranks import ShardedRunner, gather_shares, load_sharded
from qwen_moe.generation.runner import LocalRunner, Runner
from qwen_moe.generation.sampling import Sampling
from qwen_moe.models.attention.sparse import SparseRecord, SparseSettings
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights
from tests.small import small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4], [7, 7], [3, 1, 4, 1, 5]]
SAMPLING = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, samples=2, repetition_penalty=1.1, seed=3)
ENDS = [2, 11]
SPARSE = SparseSettings(kept_share=0.1, threshold=100, choosing=8, rows=16)


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


# The command's one process and its two drew other tokens: the last layer read the last token densely in one process alone.
# And the ranks counted what the last layer left out of tokens that nothing depends on.
@pytest.mark.parametrize("chunks", [None, DualChunk(chunk_size=60, local_size=16)], ids=["plain", "chunks"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
def test_layouts_read_sparsely_what_one_process_reads(layout: Layout, chunks: DualChunk | None) -> None:
    expected, record = long_answers(LocalRunner(draw_weights(long_config(chunks), 4).eval()), chunks, SPARSE)
    assert expected != long_answers(LocalRunner(draw_weights(long_config(chunks), 4).eval()), chunks, None)[0]
    assert record is not None and record.shares()["kept"] < 0.9
    results = run_distributed(_long_answers, layout.world_size, layout, chunks)
    for found, _ in results:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-10)
    joined = SparseRecord.joined(record for _, record in results)
    assert joined.shares() == pytest.approx(record.shares(), abs=1e-10)
    assert joined.layers.keys() == record.layers.keys()


def long_config(chunks: DualChunk | None) -> ModelConfig:
    return small_model(max_position_embeddings=1024, vocab_size=61, dual_chunk=chunks)


LongAnswers = tuple[list[list[float]], SparseRecord | None]


def long_answers(runner: Runner, chunks: DualChunk | None, sparse: SparseSettings | None) -> LongAnswers:
    """Log-probabilities of the answers to long prompts and of scored tokens of them, and what this rank left out."""
    engine = Engine(runner, long_config(chunks), sparse=sparse, limits=Limits(chunk=400))
    prompts = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 390, 777)]
    answers = engine.generate(prompts, Sampling(max_new_tokens=3, temperature=1.0, seed=3))
    texts = engine.likelihoods([ScoredText(prompt, 8 + len(prompt) // 20) for prompt in prompts])
    return [answer.log_probs for of in answers for answer in of] + [[text.log_prob for text in texts]], engine.record


def _long_answers(layout: Layout, chunks: DualChunk | None) -> LongAnswers:
    shape = long_config(chunks)
    grids = Grids(layout, "cpu", kv_heads=shape.num_key_value_heads)
    model = load_sharded(
        shape, ModuleTensors(draw_weights(shape, 4)), grids, torch.float64, torch.device("cpu"), "the test"
    )
    return long_answers(ShardedRunner(model, grids, torch.device("cpu")), chunks, SPARSE)


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
