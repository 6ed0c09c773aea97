"""Reward models as transformers' ...ForSequenceClassification: the same scores in float64, and the same files both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_moe.checkpoint.huggingface.config import hf_config, interpret
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf, from_pretrained, save_pretrained
from qwen_moe.config import families as table
from qwen_moe.data.tokenizer import copy_tokenizer, load_tokenizer, train_tokenizer
from qwen_moe.errors import UserError
from tests.checkpoint.huggingface.directories import files_of, write_side_files
from tests.models.hf_reference import FAMILIES, draw_weights, hf_model, model_configs, true_float64
from tests.small import small_model

CRITERIA = ("helpful", "concise", "truthful")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_scores_equal_those_of_transformers(family: str, data: st.DataObject) -> None:
    """At the last tokens of conversations of different lengths, which transformers pads."""
    criteria = CRITERIA[: data.draw(st.integers(1, 3))]
    config = data.draw(model_configs((family,), long=True)).model_copy(update={"criteria": criteria})
    ours, pad = draw_weights(config, 3), config.vocab_size - 1
    lengths = [9, 4, 7]
    rows = [torch.randint(0, pad, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    padded = torch.full((3, 9), pad)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    with true_float64():
        theirs = hf_model(ours, pad_token_id=pad)
        assert type(theirs).__name__ == table.FAMILIES[family].classifier and theirs.num_labels == len(criteria)
        with torch.no_grad():
            expected = theirs(padded, attention_mask=(padded != pad).long()).logits
    with torch.no_grad():
        found = torch.stack([ours(ids.unsqueeze(0))[0, -1] for ids in rows])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def a_model(**changes: Any) -> Any:
    return draw_weights(small_model(**changes), 5, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_both_ways_the_bytes_are_the_same(tmp_path: Path, tied: bool) -> None:
    ours = a_model(criteria=CRITERIA, tie_word_embeddings=tied)
    hf_model(ours, pad_token_id=2, eos_token_id=1).save_pretrained(tmp_path / "hf")
    write_side_files(tmp_path / "hf")
    read = convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    result = convert_to_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert all(sum(one.dtypes.values()) == one.tensors for one in (read, result)), "each expert's tensors are counted"
    assert files_of(tmp_path / "again") == files_of(tmp_path / "hf") and result.notes == ()
    loaded = from_pretrained(tmp_path / "checkpoint")
    assert loaded.config == ours.config
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_transformers_loads_what_we_export(tmp_path: Path) -> None:
    ours = a_model(criteria=CRITERIA)
    save_pretrained(ours, tmp_path / "hf")
    theirs, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(CRITERIA))
    assert torch.equal(theirs.score.weight, ours.score.weight)


def test_a_language_models_config_becomes_a_classifiers_and_back() -> None:
    """As for a reward model that was trained from a Hugging Face directory."""
    language = small_model()
    original = hf_config(language) | {"bos_token_id": 7, "made_by": "someone"}
    values = hf_config(language.model_copy(update={"criteria": CRITERIA}), original)
    assert values["architectures"] == ["Qwen2MoeForSequenceClassification"]
    assert values["id2label"] == {"0": "helpful", "1": "concise", "2": "truthful"}
    assert values["bos_token_id"] == 7 and values["made_by"] == "someone"
    assert hf_config(language, values) == original


def test_labels_mean_what_transformers_takes() -> None:
    base = hf_config(small_model()) | {"architectures": ["Qwen2MoeForSequenceClassification"]}
    for changes in ({}, {"id2label": {"0": "a"}, "label2id": {"a": 0}}, {"id2label": {"1": "b", "0": "a"}}):
        theirs = transformers.AutoConfig.for_model(**base | changes)
        assert interpret(base | changes).config.criteria == tuple(theirs.id2label[i] for i in range(theirs.num_labels))
    assert interpret(base | {"num_labels": 3}).config.criteria == ("LABEL_0", "LABEL_1", "LABEL_2")
    # A language model may carry labels that mean nothing.
    language = interpret(hf_config(small_model()) | {"id2label": {"0": "a"}})
    assert language.config.criteria == () and "not used: id2label" in " ".join(language.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"1": "a", "2": "b"}}, "expected names for 0, 1 and so on"),
        ({"id2label": {"0": 5}}, "expected names for 0, 1 and so on"),
        ({"id2label": {"0": "a"}, "num_labels": 2}, "num_labels is 2 but id2label has 1 name"),
        ({"num_labels": 0}, "num_labels is 0, expected a number of scores"),
        ({"id2label": {"0": "a", "1": "a"}}, "a name twice"),
    ],
)
def test_labels_that_contradict_are_refused(changes: dict[str, Any], message: str) -> None:
    base = hf_config(small_model()) | {"architectures": ["Qwen2MoeForSequenceClassification"]}
    with pytest.raises(UserError, match=message):
        interpret(base | changes)


@pytest.mark.parametrize(
    ("ids", "note"),
    [
        ({"pad_token_id": 1, "eos_token_id": [1, 2]}, "pad_token_id 1 of config.json also ends answers"),
        ({}, "has no pad_token_id"),
    ],
)
def test_padding_that_transformers_would_take_for_an_end_is_noted(
    tmp_path: Path, ids: dict[str, Any], note: str
) -> None:
    hf_model(a_model(criteria=CRITERIA)).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("pad_token_id", "eos_token_id")}
    path.write_text(json.dumps(values | ids))
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    (found,) = convert_to_hf(tmp_path / "checkpoint", tmp_path / "again").notes
    assert note in found


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_end|>"])
def test_the_end_of_an_answer_is_what_the_chat_template_writes(tmp_path: Path, token: str) -> None:
    """Tokenizers that are trained here pad with <|endoftext|>, which is eos_token too, but ends no answer."""
    train_tokenizer(["some text to learn from"], 280, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    hf_model(a_model(criteria=CRITERIA, vocab_size=280)).save_pretrained(tmp_path / "hf")
    copy_tokenizer(tmp_path / "tokenizer", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    ids = {"pad_token_id": tokenizer.token_to_id(token), "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    notes = convert_to_hf(tmp_path / "checkpoint", tmp_path / "again").notes
    assert len(notes) == (token == "<|im_end|>") and all("also ends answers" in note for note in notes)
