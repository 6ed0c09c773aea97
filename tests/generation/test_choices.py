"""Log-probabilities of given answers are those of plain forward passes, in any batch and layout."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Grids, Layout
from qwen_moe.checkpoint.tensor_store import ModuleTensors
from qwen_moe.config import DualChunk, ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.generation.choices import log_probs_of_choices
from qwen_moe.generation.engine import Engine, Limits
from qwen_moe.generation.ranks import ShardedRunner, gather_shares, load_sharded
from qwen_moe.generation.runner import LocalRunner
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights, hf_model, true_float64
from tests.small import small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4], [7, 7], [3, 1, 4, 1, 5]]
ONE_TOKEN = [[11], [12], [40]]
LONGER = [[11], [12, 5, 9], [12, 5], [40, 1]]


def config(**changes: Any) -> ModelConfig:
    return small_model(max_position_embeddings=64, num_hidden_layers=3, vocab_size=61, **changes)


def expected(shape: ModelConfig, choices: list[list[int]]) -> torch.Tensor:
    """transformers' model reads each prompt with each answer, by itself."""
    with true_float64(), torch.no_grad():
        model = hf_model(draw_weights(shape, 4))
        rows = []
        for prompt in PROMPTS:
            row = []
            for choice in choices:
                log_probs = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
                row.append(sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(choice)))
            rows.append(torch.stack(row))
    return torch.stack(rows)


def ours(shape: ModelConfig, choices: list[list[int]], **limits: int) -> torch.Tensor:
    engine = Engine(LocalRunner(draw_weights(shape, 4).eval()), shape, limits=Limits(**limits))
    return torch.tensor(log_probs_of_choices(engine, PROMPTS, choices), dtype=torch.float64)


@pytest.mark.parametrize("choices", [ONE_TOKEN, LONGER], ids=["one token", "longer"])
@pytest.mark.parametrize("limits", [{}, {"sequences": 1}, {"chunk": 4, "sequences": 8}], ids=str)
def test_equal_to_transformers(choices: list[list[int]], limits: dict[str, int]) -> None:
    torch.testing.assert_close(ours(config(), choices, **limits), expected(config(), choices), rtol=0, atol=1e-10)


def test_one_token_answers_need_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = LocalRunner.logits

    def counted(self: LocalRunner, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        passes.append(len(ids))
        return original(self, ids, *more)

    monkeypatch.setattr(LocalRunner, "logits", counted)
    ours(config(), ONE_TOKEN)
    assert passes == [sum(map(len, PROMPTS))]
    passes.clear()
    ours(config(), LONGER)
    assert passes == [sum(map(len, PROMPTS)), 20, 20]


def test_where_each_sequence_is_read_by_itself() -> None:
    """Dual chunk attention equals plain attention while a text is within the chunk's exact distances."""
    chunks = DualChunk(chunk_size=12, local_size=4, original_max_position_embeddings=12)
    chunked = config(dual_chunk=chunks)
    whole = ours(chunked, LONGER)
    one_by_one = ours(chunked, LONGER, sequences=1)
    torch.testing.assert_close(whole, one_by_one, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("prompts", "choices", "message"),
    [
        (PROMPTS, [[61]], "an answer has token 61 but the model's vocabulary has 61: the tokenizer belongs to another"),
        (PROMPTS, [[-1]], "an answer has token -1"),
        (PROMPTS, [[]], "an answer is empty"),
        ([[99]], ONE_TOKEN, "the prompt has token 99"),
        ([[1] * 63], LONGER, "more than the model's reach of 64"),
    ],
)
def test_what_the_model_cannot_read(prompts: list[list[int]], choices: list[list[int]], message: str) -> None:
    engine = Engine(LocalRunner(draw_weights(config(), 4).eval()), config())
    with pytest.raises(UserError, match=message):
        log_probs_of_choices(engine, prompts, choices)


def test_nan_is_named() -> None:
    model = draw_weights(config(), 4).eval()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        log_probs_of_choices(Engine(LocalRunner(model), config()), PROMPTS, ONE_TOKEN)


def _ranks(layout: Layout, choices: list[list[int]]) -> list[list[float]]:
    shape = config()
    grids = Grids(layout, "cpu", kv_heads=shape.num_key_value_heads)
    model = load_sharded(
        shape, ModuleTensors(draw_weights(shape, 4)), grids, torch.float64, torch.device("cpu"), "the test"
    )
    runner = ShardedRunner(model, grids, torch.device("cpu"))
    engine = Engine(runner, shape, limits=Limits(chunk=7, sequences=4))
    found = log_probs_of_choices(engine, runner.share_of(PROMPTS), choices)
    dist.barrier()
    return gather_shares(found, grids, len(PROMPTS))


@pytest.mark.parametrize("choices", [ONE_TOKEN, LONGER], ids=["one token", "longer"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2, ep=2)], ids=str)
def test_layouts_give_the_same(layout: Layout, choices: list[list[int]]) -> None:
    for found in run_distributed(_ranks, layout.world_size, layout, choices):
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), ours(config(), choices), rtol=0, atol=1e-10
        )
