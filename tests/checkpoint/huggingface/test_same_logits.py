"""Other ways to write the same model in config.json: transformers, our model and our exports compute the same logits."""

import copy
import json
from typing import Any

import pytest
import torch
import transformers

from qwen_moe.checkpoint.huggingface.config import hf_config, interpret
from qwen_moe.config import families as table
from qwen_moe.errors import UserError
from qwen_moe.models.init import build_model
from tests.models.hf_reference import true_float64

IDS = torch.arange(1, 31).view(1, 30)
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
FULL = {"layer_types": ["full_attention"] * 3}


def written(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a small model; a window of 5 tokens shows if transformers uses it."""
    features = table.FAMILIES[family]
    values = {
        "architectures": [features.architecture],
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rope_theta": 1000.0,
        "sliding_window": 5,
    }
    if "head_dim" in features.hf_defaults:
        values["head_dim"] = 12
    if features.moe:
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    if features.shared_expert:
        values["shared_expert_intermediate_size"] = 12
    return json.loads(json.dumps(values | changes))


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | changes}


def theirs(values: dict[str, Any], weights: dict[str, torch.Tensor] | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """transformers' logits in true float64 and its weights, random if none are given."""
    with true_float64(), torch.no_grad():
        config = transformers.AutoConfig.for_model(**copy.deepcopy(values))
        config._attn_implementation = config._experts_implementation = "eager"
        model = getattr(transformers, values["architectures"][0])(config).double().eval()
        if weights is None:
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        else:
            model.load_state_dict(weights)
        return model(input_ids=IDS).logits, model.state_dict()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "family, changes",
    [
        ("qwen2", WINDOW | {"max_window_layers": 3}),
        ("qwen2", WINDOW),  # max_window_layers is 28 by default
        ("qwen2", WINDOW | FULL | {"max_window_layers": 0}),
        ("qwen2", WINDOW | {"max_window_layers": 0, "sliding_window": None}),
        ("qwen3", WINDOW | {"max_window_layers": 5}),
        ("qwen2_moe", WINDOW | {"max_window_layers": 0}),
        ("qwen2_moe", WINDOW | FULL),
        ("qwen3_moe", WINDOW | {"sliding_window": None}),
        ("qwen2", {"rms_norm_eps": 0.0}),
        ("qwen3_moe", {"rms_norm_eps": 0.0}),
        ("qwen2_moe", {"hidden_act": "swish"}),
        ("qwen2", yarn(mscale_all_dim=0)),
        ("qwen2", yarn(mscale=2.0, mscale_all_dim=0.0)),
        ("qwen2", yarn(mscale=0, mscale_all_dim=2.0)),
        ("qwen2", yarn(mscale=2.0)),
        ("qwen2", yarn(beta_fast=0, beta_slow=0.0)),
        ("qwen2", yarn(truncate=None)),
        ("qwen2", yarn(attention_factor=1)),
    ],
)
def test_the_same_model_written_otherwise(family: str, changes: dict[str, Any]) -> None:
    values = written(family, **changes)
    expected, weights = theirs(values, None)
    config = interpret(values).config
    model = build_model(config, 0, torch.float64)
    model.load_state_dict({name: weights.get(name, own).view(own.shape) for name, own in model.state_dict().items()})
    assert relative(model(IDS).detach(), expected) < 1e-10
    assert hf_config(config, values) == values
    assert relative(theirs(hf_config(config), weights)[0], expected) < 1e-10


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("qwen2", {"max_window_layers": 2}, r"gives 1 of 3 layers a sliding window \(max_window_layers 2\)"),
        ("qwen3", {"max_window_layers": -1}, "gives 3 of 3 layers"),
        ("qwen2_moe", {"max_window_layers": 2}, "gives 1 of 3 layers"),
        ("qwen2_moe", {}, r"gives 2 of 3 layers a sliding window \(max_window_layers 28\)"),
        ("qwen3_moe", FULL | {"max_window_layers": 0}, r"gives 3 of 3 layers a sliding window \(sliding_window 5\)"),
    ],
)
def test_windows_that_transformers_uses_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    values = written(family, **WINDOW, **changes)
    plain, weights = theirs(written(family), None)
    assert relative(theirs(values, weights)[0], plain) > 1e-3
    with pytest.raises(UserError, match=message):
        interpret(values)


@pytest.mark.parametrize("value", [None, False])
def test_attention_to_later_tokens_is_refused(value: bool | None) -> None:
    """transformers reads null as false."""
    values = written("qwen2", is_causal=value)
    plain, weights = theirs(written("qwen2"), None)
    assert relative(theirs(values, weights)[0], plain) > 1e-3
    with pytest.raises(UserError, match=f"is_causal is {json.dumps(value)}, .* only causal"):
        interpret(values)


def test_a_window_without_effect_has_none_in_a_deeper_model() -> None:
    values = written("qwen2", **WINDOW, max_window_layers=3)
    deeper = interpret(values).config.model_copy(update={"num_hidden_layers": 5})
    assert hf_config(deeper, values) == values | {"num_hidden_layers": 5, "use_sliding_window": False}
