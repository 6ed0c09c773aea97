"""Generation with the cache equals generation without it and transformers' own; sampling follows its definition."""

import argparse
import contextlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, save_pretrained
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.generate import Sampling, end_tokens, generate, generate_text, register, sample
from tests.models.hf_reference import FAMILIES, draw_weights, hf_model, model_configs, true_float64
from tests.small import small_model

SETTINGS = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def greedy(max_new_tokens: int) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, temperature=0)


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
    assert generate(ours, ids, greedy(new), eos_token_id=3).tolist() == expected.tolist()


@SETTINGS
@given(config=model_configs(long=True), seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 0.7]))
def test_cache_changes_nothing(config: ModelConfig, seed: int, temperature: float) -> None:
    """Against the whole sequence run through the model for every token; and logits of every length agree."""
    model = draw_weights(config, seed).eval()
    ids = torch.randint(0, config.vocab_size, (2, 5), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(11)
    expected = ids
    with torch.no_grad():
        for _ in range(20):
            token = sample(model(expected)[:, -1], temperature, 0.9, generator)
            expected = torch.cat([expected, token.unsqueeze(1)], dim=1)
    sampling = Sampling(max_new_tokens=20, temperature=temperature, top_p=0.9, seed=11)
    assert generate(model, ids, sampling).tolist() == expected.tolist()


def test_cache_takes_several_tokens_at_once() -> None:
    """Prefill in pieces: every split gives the logits of the whole."""
    from qwen_moe.models.attention.cache import KeyValueCache

    model = draw_weights(_config(), 1).eval()
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        whole = model(ids)
        for split in (1, 5, 11):
            cache = KeyValueCache()
            parts = [model(ids[:, :split], cache=cache), model(ids[:, split:], cache=cache)]
            assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_ended_sequences_are_filled() -> None:
    """One sequence ends before the other: its rest is the end token, and the longest decides the length."""
    model = draw_weights(_config(), 5)
    ids = torch.tensor([[1, 2], [7, 9], [4, 4]])
    free = generate(model, ids, greedy(30))[:, 2:].tolist()
    end = free[0][2]
    out = generate(model, ids, greedy(30), eos_token_id=[end, 10**6])[:, 2:].tolist()
    ends = [row.index(end) if end in row else 29 for row in free]
    assert len(out[0]) == max(ends) + 1
    for row, other, at in zip(out, free, ends, strict=True):
        assert row[: at + 1] == other[: at + 1] and set(row[at + 1 :]) <= {end}


def test_sampling_follows_the_probabilities() -> None:
    """Frequencies against the closed form: temperature sharpens, the nucleus cuts the tail and renormalizes."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().double()
    draws = 40_000
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, [0.6849, 0.2466, 0.0616, 0.0068]),
        (1.0, 0.75, [0.625, 0.375, 0, 0]),
        (1.0, 0.85, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (1.0, 0.01, [1, 0, 0, 0]),
        (0.0, 0.9, [1, 0, 0, 0]),
    ):
        tokens = sample(logits.expand(draws, 4), temperature, top_p, torch.Generator().manual_seed(1))
        found = torch.bincount(tokens, minlength=4).float() / draws
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=0.012), (
            temperature,
            top_p,
            found,
        )
        assert all((count == 0) == (want == 0) for count, want in zip(found.tolist(), expected, strict=True))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-30])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """Logits over it overflow; equal largest ones still share."""
    logits = torch.tensor([[1.0, 4.0, 3.999, -2.0], [5.0, 0.0, 5.0, 1.0]])
    drawn = [sample(logits, temperature, 0.9, torch.Generator().manual_seed(seed)).tolist() for seed in range(40)]
    assert {row[0] for row in drawn} == {1} and {row[1] for row in drawn} == {0, 2}


def test_the_smallest_top_p_keeps_the_most_likely() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.9, -2.0]])
    assert {sample(logits, 1.0, 1e-300, torch.Generator().manual_seed(seed)).item() for seed in range(20)} == {1}


def test_outputs_that_are_no_numbers_are_named() -> None:
    model = draw_weights(_config(), 4, torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="outputs are NaN or infinite"):
        generate(model, torch.zeros(1, 3, dtype=torch.int64), greedy(2))


@pytest.mark.parametrize("value", [["x"], True, 2**40, -1, {}, "2"])
def test_end_tokens_that_are_no_ids(value: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"eos_token_id is .*, expected an id or a list of ids"):
        end_tokens(tmp_path, None)


def test_seed_decides() -> None:
    model = draw_weights(_config(), 2)
    ids = torch.tensor([[1, 2, 3]])
    sampling = Sampling(max_new_tokens=25, temperature=1, top_p=1)
    first, again, other = (generate(model, ids, replace(sampling, seed=seed)).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_mode_of_the_model_is_kept() -> None:
    model = draw_weights(_config(), 2).train()
    generate(model, torch.tensor([[1]]), greedy(2))
    assert model.training


def _config(**changes: Any) -> ModelConfig:
    return small_model(**{"max_position_embeddings": 64} | changes)


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens, enough to be read by AutoTokenizer."""
    letters = [*"abcdefghijklmnopqrstuvwxyz \u0120.", "<|endoftext|>"]
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def folders() -> Any:
    """A Hugging Face directory with a tokenizer and a checkpoint made from it."""
    with tempfile.TemporaryDirectory() as folder:
        hf, checkpoint = Path(folder) / "hf", Path(folder) / "checkpoint"
        save_pretrained(draw_weights(_config(), 4, torch.float32), hf, tokenizer=tokenizer())
        convert_from_hf(hf, checkpoint)
        yield hf, checkpoint


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
    save_pretrained(draw_weights(_config(), 4, torch.float32), tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokenizer"):
        generate_text(tmp_path / "bare", "a", Sampling())
    with pytest.raises(UserError, match="does not exist"):
        generate_text(tmp_path / "nowhere", "a", Sampling())


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_pretrained(draw_weights(_config(vocab_size=5), 4, torch.float32), tmp_path / "small", tokenizer=None)
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
