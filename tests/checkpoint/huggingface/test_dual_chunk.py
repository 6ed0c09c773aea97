"""dual_chunk_attention_config both ways."""

import json
from typing import Any

import pytest

from qwen_moe.checkpoint.huggingface.config import hf_config, interpret, model_config_from_hf
from qwen_moe.config import DualChunk
from qwen_moe.errors import UserError
from tests.small import small_model

# As published with Qwen2.5-7B-Instruct-1M.
PUBLISHED = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def published(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "dual_chunk_attention_config": PUBLISHED | changes,
        "max_position_embeddings": 1010000,
        "model_type": "qwen2",
        "rope_theta": 10000000.0,
    }


def test_published_settings_are_read_and_kept() -> None:
    values = published(made_up=[1, 2], sparse_attention_enabled=True)
    found = interpret(values)
    assert found.config.dual_chunk == DualChunk(**PUBLISHED) and found.config.reach == 1010000
    assert "not used in dual_chunk_attention_config: made_up" in found.notes
    assert not any("dual_chunk_attention_config" in note for note in found.notes if "made_up" not in note)
    assert json.dumps(hf_config(found.config, values)) == json.dumps(values)


@pytest.mark.parametrize("clamp", ["trained", "code"])
@pytest.mark.parametrize("trained", [None, 32])
def test_ours_are_written_and_read_again(clamp: Any, trained: int | None) -> None:
    chunks = DualChunk(chunk_size=64, local_size=8, original_max_position_embeddings=trained, clamp=clamp)
    config = small_model(dual_chunk=chunks)
    values = json.loads(json.dumps(hf_config(config)))
    assert model_config_from_hf(values) == config
    inside = values["dual_chunk_attention_config"]
    assert inside == chunks.model_dump(exclude_defaults=True) and ("clamp" in inside) == (clamp == "code")


def test_settings_that_change_keep_the_keys_that_do_not() -> None:
    values = published(sparse_attention_threshold=9, made_up=1)
    config = model_config_from_hf(values)
    changed = config.model_copy(update={"dual_chunk": DualChunk(chunk_size=4096, local_size=128)})
    inside = hf_config(changed, values)["dual_chunk_attention_config"]
    assert inside == {"chunk_size": 4096, "local_size": 128, "sparse_attention_threshold": 9, "made_up": 1}
    plain = config.model_copy(update={"dual_chunk": None})
    assert "dual_chunk_attention_config" not in hf_config(plain, values) | hf_config(plain)
    again = hf_config(config, hf_config(plain, values))
    assert again["dual_chunk_attention_config"] == PUBLISHED


def test_no_scaling_is_said_as_vllm_says_it() -> None:
    for values in (published(original_max_position_embeddings=0), published(original_max_position_embeddings=None)):
        config = model_config_from_hf(values)
        assert config.dual_chunk == DualChunk(chunk_size=262144, local_size=8192)
        assert hf_config(config, values) == values


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ([8], r"dual_chunk_attention_config is \[8\], expected a mapping"),
        ({}, "dual_chunk_attention_config.chunk_size: Field required; vLLM's default is 8192"),
        ({"chunk_size": 8}, "dual_chunk_attention_config.local_size: Field required; vLLM's default is 1024"),
        ({"chunk_size": 8, "local_size": 8}, "local_size 8 is not below chunk_size 8"),
        ({"chunk_size": "wide", "local_size": 8}, "dual_chunk_attention_config.chunk_size is 'wide': "),
        ({"chunk_size": True, "local_size": 8}, "dual_chunk_attention_config.chunk_size is True: "),
    ],
)
def test_wrong_settings_are_refused(inside: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_config_from_hf(published() | {"dual_chunk_attention_config": inside}, "somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json: ")
