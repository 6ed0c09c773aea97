"""Compiled steps compute what the decoder's own `read` computes, for every family, batch and kind of cache."""

import argparse
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.cli import main
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.generation.cache import SequenceCache
from qwen_moe.generation.command import reading_of
from qwen_moe.generation.engine import Completion, Engine
from qwen_moe.generation.extension import extended
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.step import CompiledStep, _most_are_chosen, check_compiled_step
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.moe.block import MoE
from tests.models.hf_reference import draw_weights
from tests.small import small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4]]
SAMPLING = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, seed=3)
SHAPES: dict[str, dict[str, Any]] = {
    "experts, shared expert, bias": {},
    "experts, norms of heads": {"family": "qwen3_moe", "shared_expert_intermediate_size": 0},
    "dense, bias, tied": {"family": "qwen2", "tie_word_embeddings": True},
    "dense, norms of heads": {"family": "qwen3"},
    "dense and sparse layers": {"mlp_only_layers": [1]},
}


def config(**changes: Any) -> ModelConfig:
    return small_model(**{"max_position_embeddings": 64, "num_hidden_layers": 3, "vocab_size": 61} | changes)


class Counted(CompiledStep):
    steps = 0

    def read(self, ids: torch.Tensor, cache: SequenceCache, chosen: list[torch.Tensor] | None = None) -> torch.Tensor:
        Counted.steps += 1
        return super().read(ids, cache, chosen)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.generation.runner.CompiledStep", Counted)
    Counted.steps = 0


@pytest.fixture
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions as they are written, which are compiled elsewhere."""
    monkeypatch.setattr("qwen_moe.generation.step.compiled", lambda function: function)


def both(
    shape: ModelConfig,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    dtype: torch.dtype = torch.float64,
    ends: tuple[int, ...] = (),
) -> list[list[list[Completion]]]:
    """Answers by the decoder, and by compiled steps."""
    model = draw_weights(shape, 4, dtype).eval()
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):
            bias.copy_(torch.linspace(0.2, -0.2, len(bias)))
    return [
        Engine(LocalRunner(model, compiled=compiled), shape, end_tokens=ends).generate(
            prompts, sampling, routing=bool(shape.moe_layers)
        )
        for compiled in (False, True)
    ]


def check(eager: list[list[Completion]], compiled: list[list[Completion]]) -> None:
    for ours, expected in zip(chain(*compiled), chain(*eager), strict=True):
        assert ours.tokens == expected.tokens and ours.finish_reason == expected.finish_reason
        assert ours.log_probs == pytest.approx(expected.log_probs, rel=0, abs=1e-10)
        assert (ours.routing is None) == (expected.routing is None)
        if ours.routing is not None and expected.routing is not None:
            assert torch.equal(ours.routing.whole(), expected.routing.whole())


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three prompts", "one prompt"])
def test_equals_the_decoder(as_written: None, name: str, prompts: list[list[int]], samples: int) -> None:
    sampling = Sampling(max_new_tokens=9, temperature=1.0, samples=samples, seed=3)
    check(*both(config(**SHAPES[name]), prompts, sampling))
    assert Counted.steps == 8


@pytest.fixture(params=[False, True], ids=["chosen experts", "all experts"])
def all_experts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all experts multiply all tokens, as in half precision."""
    monkeypatch.setattr("qwen_moe.generation.step._most_are_chosen", lambda tokens, moe, dtype: request.param)


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("dense,")])
def test_all_experts_or_the_chosen_ones(as_written: None, all_experts: None, name: str) -> None:
    check(*both(config(**SHAPES[name]), PROMPTS, SAMPLING, ends=(2, 11)))


def test_when_all_experts_multiply_all_tokens() -> None:
    moe = draw_weights(config(num_experts=16, num_experts_per_tok=2), 4).model.layers[0].mlp
    assert isinstance(moe, MoE)
    half, single = torch.bfloat16, torch.float32
    asked = [(5, half), (6, half), (32, half), (33, half), (6, single)]  # (7 / 8)^5 = 0.51 of the experts have no token
    assert [_most_are_chosen(tokens, moe, dtype) for tokens, dtype in asked] == [False, True, True, False, False]


def test_the_model_keeps_its_weights_and_holds_nothing_twice() -> None:
    model = draw_weights(config(), 4).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    LocalRunner(model, compiled=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    attention = model.model.layers[0].self_attn
    storages = {
        one.weight.untyped_storage().data_ptr() for one in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(storages) == 1


@pytest.mark.parametrize("name", list(SHAPES)[:2])
def test_compiled(all_experts: None, name: str) -> None:
    """One sequence and several have code of their own. Rows leave the batch, and need no other code."""
    check(*both(config(**SHAPES[name]), PROMPTS * 2, SAMPLING, ends=(2, 11)))
    check(*both(config(**SHAPES[name]), PROMPTS[:1], SAMPLING))
    assert Counted.steps > 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_narrow_dtypes_are_as_exact_as_the_decoder(as_written: None, dtype: torch.dtype) -> None:
    model = draw_weights(config(), 4, dtype).eval()
    exact = DecoderLM(config()).to(torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    errors = torch.zeros(2, dtype=torch.float64)
    for prompt in range(1, 40):
        found = []
        for runner in (LocalRunner(exact), LocalRunner(model), LocalRunner(model, compiled=True)):
            engine = Engine(runner, model.config)
            (answer,) = engine.generate([[prompt]], Sampling(max_new_tokens=2, temperature=0))[0]
            found.append(answer)
        if len({tuple(answer.tokens) for answer in found}) == 1:
            values = torch.tensor([answer.log_probs[1] for answer in found], dtype=torch.float64)
            errors += (values[1:] - values[0]).abs()
    assert 0 < errors[1] < 1.3 * errors[0] and Counted.steps == 39


def test_long_texts_that_need_the_reader_are_read_by_the_decoder(as_written: None) -> None:
    """Dual chunk attention reads new tokens one sequence after another."""
    shape = extended(config(), "dca", 500)
    long = [[1 + i % 50 for i in range(120)], [3, 4]]
    check(*both(shape, long, SAMPLING))
    assert Counted.steps == 0
    check(*both(extended(config(), "yarn", 500), long, SAMPLING))
    assert Counted.steps > 0


def test_several_rows_that_the_processor_cannot_multiply(as_written: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.generation.step.has_hardware", lambda dtype: dtype != torch.float64)
    check(*both(config(), PROMPTS, SAMPLING))
    assert Counted.steps == 0
    check(*both(config(), PROMPTS[:1], SAMPLING))  # a product of one row is a sum in any dtype
    assert Counted.steps == 8


def test_refusals(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--compile is for CPUs, and the model is on cuda: leave it out"):
        check_compiled_step(torch.device("cuda"))
    command = ["generate", "--checkpoint", str(folders[0]), "--prompt", "ab", "--compile"]
    command += ["--max-new-tokens", "6"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-compiler")
    assert main(command) == 2
    assert "--compile needs what is missing here: a C++ compiler: install g++ or clang++" in capsys.readouterr().err
    assert main([*command, "--tp", "2"]) == 2
    assert "--compile is for one process: leave out --compile, or --tp, --ep, --pp" in capsys.readouterr().err


def test_the_command(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "ab"}\n')
    command = ["generate", "--checkpoint", str(folders[0]), "--input", str(prompts), "--output", str(answers)]
    command += ["--max-new-tokens", "6", "--dtype", "fp64"]
    assert main([*command, "--compile"]) == 0 and Counted.steps > 0
    made = [json.loads(line)["completions"][0]["tokens"] for line in answers.read_text().splitlines()]
    answers.unlink()
    assert main(command) == 0
    assert made == [json.loads(line)["completions"][0]["tokens"] for line in answers.read_text().splitlines()]


def test_answers_with_and_without_it_do_not_mix() -> None:
    """They may differ in the last digit, so a file of answers says which it has."""
    values: dict[str, Any] = {"context_extension": "none", "chunk_size": None, "attention": "dense", "kept_share": None}
    assert "compile" not in reading_of(argparse.Namespace(**values, compile=False))
    assert reading_of(argparse.Namespace(**values, compile=True))["compile"] is True
