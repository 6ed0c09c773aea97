"""Generation with the cache equals generation without it and transformers' own; sampling follows its definition; and the
verb on one prompt."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel.gemm import HALF
from qwen_moe.checkpoint.huggingface.convert import save_pretrained
from qwen_moe.errors import UserError
from qwen_moe.generation.command import register
from qwen_moe.generation.engine import Engine, Limits
from qwen_moe.generation.extension import extended
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling, draw, uniforms
from qwen_moe.generation.text import generate_text
from qwen_moe.generation.tokenizer import end_tokens
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.ops.grouped_matmul import _padded_times, grouped_mm
from tests.generation.conftest import small_config, tokenizer
from tests.models.grouped_loop import loop_mm
from tests.models.hf_reference import FAMILIES, draw_weights, hf_model, model_configs, true_float64

SETTINGS = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def greedy(max_new_tokens: int, **changes: Any) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, temperature=0, **changes)


def generate(
    model: DecoderLM, prompts: list[list[int]], sampling: Sampling, ends: Sequence[int] = (), **limits: int
) -> list[list[int]]:
    """The new tokens of each prompt's first answer."""
    engine = Engine(LocalRunner(model), model.config, end_tokens=ends, limits=Limits(**limits))
    return [answers[0].tokens for answers in engine.generate(prompts, sampling)]


@pytest.mark.parametrize("family", FAMILIES)
@SETTINGS
@given(data=st.data())
def test_greedy_equals_transformers(family: str, data: st.DataObject) -> None:
    config = data.draw(model_configs((family,), long=True))
    ours = draw_weights(config, data.draw(st.integers(0, 99)))
    seed, length, new = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    ids = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    with true_float64():
        theirs = hf_model(ours)
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=3,
        )
    found = generate(ours, ids.tolist(), greedy(new), [3], chunk=data.draw(st.integers(1, 20)))
    for tokens, row in zip(found, expected[:, length:].tolist(), strict=True):
        assert tokens == row[: len(tokens)] and set(row[len(tokens) :]) <= {3}


@SETTINGS
@given(data=st.data())
def test_the_batch_changes_nothing(data: st.DataObject) -> None:
    """Prompts of any lengths, several answers each, chunks and batches of any size: tokens and log-probabilities are those
    of the whole sequence run through the model for every token, with the same random numbers."""
    config = data.draw(model_configs(long=True))
    model = draw_weights(config, data.draw(st.integers(0, 99))).eval()
    token = st.integers(0, config.vocab_size - 1)
    prompts = data.draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=5))
    sampling = Sampling(
        max_new_tokens=data.draw(st.integers(1, 12)),
        temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
        top_p=0.9,
        samples=data.draw(st.integers(1, 3)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        seed=11,
    )
    ends = data.draw(st.lists(token, max_size=8))
    limits = Limits(chunk=data.draw(st.integers(1, 30)), sequences=data.draw(st.integers(1, 16)))
    found = Engine(LocalRunner(model), config, end_tokens=ends, limits=limits).generate(prompts, sampling)
    for number, (prompt, answers) in enumerate(zip(prompts, found, strict=True)):
        assert len(answers) == sampling.samples
        for sample, answer in enumerate(answers):
            tokens, log_probs = one_by_one(model, prompt, sampling, ends, uniforms(11, number, sample))
            assert answer.tokens == tokens
            torch.testing.assert_close(torch.tensor(answer.log_probs), torch.tensor(log_probs), rtol=0, atol=1e-10)
            assert answer.finish_reason == ("stop" if tokens[-1] in ends else "length")


def one_by_one(
    model: DecoderLM, prompt: list[int], sampling: Sampling, ends: list[int], generator: torch.Generator
) -> tuple[list[int], list[float]]:
    ids, log_probs = list(prompt), []
    with torch.no_grad():
        for step in range(sampling.max_new_tokens):
            if step % 64 == 0:
                chances = torch.rand(64, generator=generator, dtype=torch.float64)
            occurred = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
            occurred[0, ids] = sampling.repetition_penalty != 1
            token, log_prob = draw(model(torch.tensor([ids]))[:, -1], sampling, chances[step % 64][None], occurred)
            ids.append(int(token))
            log_probs.append(float(log_prob))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :], log_probs


def test_a_cache_of_a_few_experts_reads_what_the_loop_reads() -> None:
    """With few rows only the weights of experts that have rows are read."""
    x, counts = torch.randn(5, 8), torch.tensor([0, 3, 0, 2])
    weight = torch.randn(4, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(grouped_mm(x, weight, counts), loop_mm(x, weight, counts))


@pytest.mark.parametrize("chunk", [None, 16], ids=["together", "one sequence after another"])
def test_bfloat16_without_its_instructions(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are kept in float32 there, and attention's output is the model's bfloat16 again."""
    monkeypatch.setattr("parallel.gemm.has_hardware", lambda dtype: dtype not in HALF)
    shape = small_config()
    prompts = [[1 + i % 20 for i in range(50)], [4, 5]]
    model = draw_weights(shape, 4, torch.bfloat16).eval()
    exact = DecoderLM(shape).to(torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    config = shape if chunk is None else extended(shape, "dca", 200, chunk)
    found, expected = (Engine(LocalRunner(one), config).generate(prompts, greedy(3)) for one in (model, exact))
    for (ours,), (theirs,) in zip(found, expected, strict=True):
        assert ours.log_probs[0] == pytest.approx(theirs.log_probs[0], abs=0.05)
        assert len(ours.tokens) == 3


def test_many_experts_of_a_few_rows_each_are_one_product() -> None:
    """In bfloat16, where most experts have several rows; one of them has none."""
    counts = torch.tensor([2, 0, 5, 1, 3])
    x, weight = torch.randn(11, 16).bfloat16(), torch.randn(5, 24, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(_padded_times(x, weight, counts, 5), loop_mm(x, weight, counts))
        torch.testing.assert_close(grouped_mm(x, weight, counts), loop_mm(x, weight, counts))


def test_an_answer_ends_at_a_stop_string(folders: tuple[Path, Path]) -> None:
    sampling = Sampling(max_new_tokens=9, seed=3)
    free = generate_text(folders[0], "ab c", sampling)
    stop = free.completion[3:5]
    assert len(stop) == 2
    result = generate_text(folders[0], "ab c", replace(sampling, stop=("not there", stop)))
    assert result.completion == free.completion[: free.completion.find(stop)] and result.finish_reason == "stop"
    assert result.new_tokens < free.new_tokens


def probabilities(logits: torch.Tensor, draws: int, **values: Any) -> torch.Tensor:
    """How often each token is drawn."""
    chance = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, _ = draw(logits.expand(draws, -1), Sampling(**values), chance)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / draws


def test_sampling_follows_the_probabilities() -> None:
    """Frequencies against the closed form: temperature sharpens, the nucleus cuts the tail and renormalizes."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().double()
    for values, expected in (
        ({"temperature": 1.0, "top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5, "top_p": 1.0}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"temperature": 1.0, "top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.85}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 0.0, "top_p": 0.9}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6, "top_k": 2}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 1.0, "min_p": 0.35}, [0.625, 0.375, 0, 0]),
        ({"temperature": 2.0, "top_p": 1.0, "min_p": 0.5}, [0.4303, 0.3333, 0.2357, 0]),
    ):
        found = probabilities(logits, 40_000, **values)
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=0.012), (values, found)
        assert all((count == 0) == (want == 0) for count, want in zip(found.tolist(), expected, strict=True))


CHOICES = {
    "temperature": (0.5, 1.0, 1.7),
    "top_p": (0.4, 0.9, 1.0),
    "top_k": (0, 1, 5),
    "min_p": (0.0, 0.1),
    "repetition_penalty": (1.0, 1.4),
}


@pytest.mark.parametrize(
    "values", [dict(zip(CHOICES, one, strict=True)) for one in product(*CHOICES.values())], ids=str
)
def test_tokens_that_may_be_drawn_are_those_of_transformers(values: dict[str, Any]) -> None:
    """Penalty, temperature, top-k, top-p and min-p against transformers' processors in its order."""
    from transformers import generation

    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(1, 30, generator=generator)
    ids = logits.argsort(descending=True)[:, [0, 2, 5, 20, 27]]  # likely ones, and some with a negative logit
    assert bool((logits.gather(1, ids) > 0).any()) and bool((logits.gather(1, ids) < 0).any())
    scores = generation.RepetitionPenaltyLogitsProcessor(values["repetition_penalty"])(ids, logits.clone())
    scores = scores / values["temperature"]
    if values["top_k"]:
        scores = generation.TopKLogitsWarper(values["top_k"])(ids, scores)
    if values["top_p"] < 1:
        scores = generation.TopPLogitsWarper(values["top_p"])(ids, scores)
    if values["min_p"]:
        scores = generation.MinPLogitsWarper(values["min_p"])(ids, scores)
    expected = scores.softmax(-1)[0].double()
    occurred = torch.zeros(1, 30, dtype=torch.bool).scatter_(1, ids, True)
    draws = 4000
    chance = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens, log_probs = draw(logits.expand(draws, -1), Sampling(**values), chance, occurred.expand(draws, -1))
    found = torch.bincount(tokens, minlength=30).double() / draws
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / draws)
    own = (logits / values["temperature"]).log_softmax(-1)[0]
    torch.testing.assert_close(log_probs, own[tokens], rtol=1e-5, atol=1e-5)


def test_what_occurred_stays_with_its_prompt_when_others_have_ended() -> None:
    """Two of four prompts end with their first token; the rows of the others move up."""
    model = draw_weights(small_config(), 6)
    prompts = [[5, 6], [7, 8], [1, 2], [3, 4]]
    sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=1.0, repetition_penalty=6.0, seed=0)
    ends = [tokens[0] for tokens in generate(model, prompts, sampling)[:2]]
    engine = Engine(LocalRunner(model), model.config, end_tokens=ends)
    together = [answer.tokens for (answer,) in engine.generate(prompts, sampling)]
    assert [len(tokens) for tokens in together[:2]] == [1, 1] and min(map(len, together[2:])) > 8
    for number, prompt in enumerate(prompts):
        ((alone,),) = engine.generate([prompt], sampling, numbers=[number])
        assert alone.tokens == together[number]


def test_a_large_vocabulary_is_sorted_only_as_far_as_needed() -> None:
    """A nucleus within the first thousand tokens, and one far beyond."""
    flat = torch.zeros(5000).double()
    peaked = torch.linspace(0, -50, 5000).double()
    for logits in (flat, peaked):
        kept = (probabilities(logits, 4000, temperature=1.0, top_p=0.5) > 0).sum()
        order = logits.softmax(-1).sort(descending=True).values
        assert kept <= int((order.cumsum(0) - order < 0.5).sum()) + 1
    assert kept > 30 and (probabilities(flat, 4000, temperature=1.0, top_p=0.5) > 0).sum() > 1500


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-30])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """Logits over it overflow; equal largest ones still share."""
    logits = torch.tensor([[1.0, 4.0, 3.999, -2.0], [5.0, 0.0, 5.0, 1.0]])
    assert probabilities(logits[0], 40, temperature=temperature, top_p=0.9)[1] == 1
    assert {i for i, p in enumerate(probabilities(logits[1], 40, temperature=temperature, top_p=0.9)) if p} == {0, 2}


def test_the_smallest_top_p_keeps_the_most_likely() -> None:
    assert probabilities(torch.tensor([1.0, 4.0, 3.9, -2.0]), 20, temperature=1.0, top_p=1e-300)[1] == 1


@pytest.mark.parametrize("value", [["x"], True, 2**40, -1, {}, "2"])
def test_end_tokens_that_are_no_ids(value: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"eos_token_id is .*, expected an id or a list of ids"):
        end_tokens(tmp_path, None)


def test_seed_decides() -> None:
    model = draw_weights(small_config(), 2)
    sampling = Sampling(max_new_tokens=25, temperature=1, top_p=1)
    first, again, other = (generate(model, [[1, 2, 3]], replace(sampling, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    # Answers to one prompt differ, and so do those to two prompts that are the same.
    (one, two), (three, four) = (
        [answer.tokens for answer in answers]
        for answers in Engine(LocalRunner(model), model.config).generate([[1, 2, 3]] * 2, replace(sampling, samples=2))
    )
    assert len({tuple(tokens) for tokens in (one, two, three, four)}) == 4


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args(["generate", *map(str, arguments)])
    return args.func(args)


def test_verb_on_both_kinds_of_directory(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for directory in folders:
        assert run("--checkpoint", directory, "--prompt", "ab c", "--max-new-tokens", 9, "--json", "--seed", 3) == 0
        found.append(json.loads(capsys.readouterr().out))
        found[-1].pop("seconds")
    assert found[0] == found[1]
    assert found[0]["prompt_tokens"] == 4 and 1 <= found[0]["new_tokens"] <= 9 and found[0]["dtype"] == "float32"
    assert run("--checkpoint", folders[0], "--prompt", "ab c", "--max-new-tokens", 9, "--seed", 3) == 0
    assert capsys.readouterr().out == "ab c" + found[0]["completion"] + "\n"


def test_text_equals_transformers(folders: tuple[Path, Path]) -> None:
    """Greedy text from the directory by transformers alone, its own tokenizer and end token."""
    import transformers

    hf, checkpoint = folders
    reader = transformers.AutoTokenizer.from_pretrained(hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert model.generation_config.eos_token_id == reader.eos_token_id == 29
    inputs = reader("hello", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=29)[0]
    result = generate_text(checkpoint, "hello", greedy(30))
    assert result.prompt + result.completion == reader.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a\ud800"}, "prompt is not valid UTF-8"),
        ({"seed": -1}, "seed is -1: give a whole number from 0"),
        ({"seed": 2**64}, "seed is 1.844674407e[+]19: give a whole number from 0"),
        ({"max_new_tokens": 60}, "65, more than the model's reach of 64 tokens.*at most 59"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_bad_input(folders: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        values = {"max_new_tokens": 3} | changes
        prompt = values.pop("prompt", "abcde")
        generate_text(folders[0], prompt, Sampling(**values))


def test_no_tokenizer_and_no_directory(tmp_path: Path) -> None:
    save_pretrained(draw_weights(small_config(), 4, torch.float32), tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokenizer"):
        generate_text(tmp_path / "bare", "a", Sampling())
    with pytest.raises(UserError, match="does not exist"):
        generate_text(tmp_path / "nowhere", "a", Sampling())


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_pretrained(draw_weights(small_config(vocab_size=5), 4, torch.float32), tmp_path / "small", tokenizer=None)
    tokenizer().save_pretrained(str(tmp_path / "small"))
    with pytest.raises(UserError, match="token 25 but the model's vocabulary has 5"):
        generate_text(tmp_path / "small", "z", Sampling(max_new_tokens=2))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "the tokenizer in .* cannot be read"),
        ("tokenizer.json", '{"model": 3}', "the tokenizer in .* cannot be read"),
        ("generation_config.json", "{", r"generation_config\.json is not valid JSON"),
        ("generation_config.json", "[]", r"generation_config\.json must hold a JSON object"),
        ("generation_config.json", '{"eos_token_id": "a"}', "eos_token_id is 'a', expected an id or a list of ids"),
        ("generation_config.json", '{"eos_token_id": [1, null]}', r"eos_token_id is \[1, None\], expected an id"),
    ],
)
def test_damaged_files_beside_the_weights(
    folders: tuple[Path, Path], tmp_path: Path, name: str, content: str, message: str
) -> None:
    shutil.copytree(folders[0], tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        generate_text(tmp_path / "hf", "abc", Sampling(max_new_tokens=2))


def test_code_in_a_strangers_directory_is_not_run(folders: tuple[Path, Path], tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    shutil.copytree(folders[0], directory)
    (directory / "code.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\nclass Own: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        values = json.loads((directory / name).read_text())
        values["auto_map"] = {"AutoTokenizer": ["code.Own", None], "AutoConfig": "code.Own", "AutoModel": "code.Own"}
        values.pop("tokenizer_class", None)
        (directory / name).write_text(json.dumps(values))
    with contextlib.suppress(UserError):
        generate_text(directory, "abc", Sampling(max_new_tokens=2))
    assert not (tmp_path / "made").exists()
