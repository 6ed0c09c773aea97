"""Texts longer than a model was trained on: which extension, and new tokens read as if they had been in the prompt."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Engine, Limits
from qwen_moe.generation.extension import Extension, _local, extended
from qwen_moe.generation.open import KEPT_SHARE, HowToRead
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling
from qwen_moe.models.attention.sparse import SparseSettings
from tests.models.hf_reference import draw_weights
from tests.small import small_model

TRAINED = 32


def config(**changes: Any) -> ModelConfig:
    return small_model(max_position_embeddings=TRAINED, **changes)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    vocabulary = config().vocab_size
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (3, 70, 31, 95)]


@pytest.mark.parametrize("extension", ["yarn", "dca"])
@pytest.mark.parametrize("samples", [1, 2])
def test_new_tokens_are_read_as_if_they_had_been_in_the_prompt(extension: Any, samples: int) -> None:
    model, new = draw_weights(config(), 4).eval(), 10
    longer = extended(config(), extension, 110)
    engine = Engine(LocalRunner(model), longer, limits=Limits(chunk=40))
    sampling = Sampling(max_new_tokens=new, temperature=0, samples=samples)
    for prompt, answers in zip(prompts(), engine.generate(prompts(), sampling), strict=True):
        tokens, log_probs = list(prompt), []
        for _ in range(new):
            answer = engine.generate([tokens], replace(sampling, max_new_tokens=1, samples=1))[0][0]
            tokens += answer.tokens
            log_probs += answer.log_probs
        for found in answers:
            assert found.tokens == tokens[len(prompt) :]
            torch.testing.assert_close(torch.tensor(found.log_probs), torch.tensor(log_probs), rtol=0, atol=1e-10)


def test_within_the_trained_length_dual_chunk_attention_is_plain() -> None:
    model = draw_weights(config(), 4).eval()
    short, sampling = [p for p in prompts() if len(p) < 20], Sampling(max_new_tokens=8, temperature=0)
    found = Engine(LocalRunner(model), extended(config(), "dca", 500)).generate(short, sampling)
    assert found == Engine(LocalRunner(model), config()).generate(short, sampling)


def test_sparse_prefill_that_keeps_everything_is_dense() -> None:
    """And it says what it kept."""
    model = draw_weights(config(), 4).eval()
    longer, sampling = extended(config(), "dca", 110), Sampling(max_new_tokens=4, temperature=0)
    sparse = SparseSettings(kept_share=1.0, threshold=40, choosing=4)
    engine = Engine(LocalRunner(model), longer, sparse=sparse, limits=Limits(chunk=48))
    dense = Engine(LocalRunner(model), longer).generate(prompts(), sampling)
    for ours, theirs in zip(engine.generate(prompts(), sampling), dense, strict=True):
        assert ours[0].tokens == theirs[0].tokens
        torch.testing.assert_close(
            torch.tensor(ours[0].log_probs), torch.tensor(theirs[0].log_probs), rtol=0, atol=1e-10
        )
    assert engine.record is not None and engine.record.layers.keys() == {0}  # the last layer reads one query a prompt
    assert sum(layer.sparse_heads + layer.dense_heads for layer in engine.record.layers.values()) > 0


def test_the_kept_share_that_was_asked_for() -> None:
    """A little of it lets budgets stay small; without a number it is that of `SparseSettings`."""
    assert SparseSettings().kept_share == KEPT_SHARE
    with pytest.raises(UserError, match=r"--kept-share 0.5 is for sparse attention: add --attention sparse"):
        HowToRead(kept_share=0.5)


@pytest.mark.parametrize("extension", ["none", "yarn", "plain"])
def test_a_chunk_size_without_dual_chunk_attention_is_refused(extension: Extension) -> None:
    with pytest.raises(UserError, match=f"--chunk-size 16 is for dual chunk attention, .* is {extension}: give"):
        HowToRead(chunk=16, extension=extension)
    assert HowToRead(chunk=16, extension="auto").chunk == 16
    model = draw_weights(config(), 4).eval()
    longer, sampling = extended(config(), "dca", 2100), Sampling(max_new_tokens=1, temperature=0)
    prompt = [n % 50 for n in range(2048)]
    work = []
    for share in (0.01, 0.99):
        sparse = SparseSettings(kept_share=share, threshold=40, choosing=4, rows=16)
        engine = Engine(LocalRunner(model), longer, sparse=sparse)
        engine.generate([prompt], sampling)
        assert engine.record is not None
        work.append(engine.record.work)
    assert work[0] < 0.5 < work[1]


def test_auto_extends_only_what_does_not_reach() -> None:
    assert extended(config(), "auto", TRAINED) == extended(config(), "none", 10**6) == config()
    longer = extended(config(), "auto", 200)
    assert longer.dual_chunk is not None and longer.dual_chunk.chunk_size == TRAINED * 3 // 4 and longer.reach == 200
    yarn = extended(config(), "yarn", 200)
    assert yarn.rope_scaling is not None and yarn.rope_scaling.factor == 7 and yarn.reach == 224


def test_chunks_of_another_size() -> None:
    chunks = extended(config(), "dca", 200, chunk=16).dual_chunk
    assert chunks is not None and (chunks.chunk_size, chunks.local_size) == (16, 4)
    assert [_local(size) for size in (256, 4096, 262144)] == [64, 128, 8192]  # the last is Qwen2.5-1M's
    for size in (1, TRAINED + 1):
        with pytest.raises(UserError, match=f"--chunk-size {size}: give 2 to {TRAINED}"):
            extended(config(), "dca", 200, chunk=size)


def test_what_cannot_be_extended() -> None:
    with pytest.raises(UserError, match=f"yarn: the model reaches {TRAINED} tokens and the longest text has 20.*leave"):
        extended(config(), "yarn", 20)
    with pytest.raises(UserError, match=r"has its own extension \(model.dual_chunk\), which reaches 100"):
        extended(extended(config(), "dca", 100), "dca", 101)
