"""config.json both ways: transformers' meaning of every key, old and new names, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_moe.checkpoint.huggingface.config import hf_config, interpret, model_config_from_hf
from qwen_moe.checkpoint.huggingface.names import expert_biases, parameters
from qwen_moe.config import ModelConfig
from qwen_moe.config import families as table
from qwen_moe.config.presets import PRESETS
from qwen_moe.errors import UserError
from qwen_moe.models.decoder import DecoderLM
from tests.models.hf_reference import FAMILIES, model_configs

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def minimal(family: str = "qwen2_moe", **changes: Any) -> dict[str, Any]:
    return {"architectures": [table.FAMILIES[family].architecture], "model_type": family} | changes


def _scaling(parameters: dict[str, Any]) -> dict[str, Any] | None:
    """transformers' RoPE parameters under our names."""
    others = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type", "type")}
    return None if parameters["rope_type"] == "default" else {"type": parameters["rope_type"], **others}


def semantics(config: Any) -> dict[str, Any]:
    """What transformers' config object means, in our names."""
    family = config.model_type
    features = table.FAMILIES[family]
    moe = features.moe
    heads = config.num_attention_heads
    return {
        "family": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": _scaling(config.rope_parameters),
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "qkv_bias": getattr(config, features.qkv_bias_key) if features.qkv_bias_key else features.qkv_bias,
        "num_experts": config.num_experts if moe else 0,
        "num_experts_per_tok": config.num_experts_per_tok if moe else 0,
        "moe_intermediate_size": config.moe_intermediate_size if moe else 0,
        "shared_expert_intermediate_size": getattr(config, "shared_expert_intermediate_size", 0),
        "norm_topk_prob": config.norm_topk_prob if moe else False,
        "decoder_sparse_step": config.decoder_sparse_step if moe else 1,
        "mlp_only_layers": tuple(config.mlp_only_layers) if moe else (),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_takes(family: str) -> None:
    features = table.FAMILIES[family]
    theirs = getattr(transformers, features.architecture).config_class()
    assert theirs.model_type == family
    found = interpret(minimal(family))
    assert found.config == ModelConfig(**semantics(theirs))
    assert any("rope_theta" in note and "10000" in note for note in found.notes)
    assert any("hidden_size=" in note for note in found.notes)
    assert (
        features.hf_defaults.items()
        <= {
            **theirs.to_dict(),
            "num_experts": getattr(theirs, "num_experts", None),
        }.items()
    )


@SETTINGS
@given(config=model_configs(), extra=st.booleans())
def test_both_ways_and_through_transformers(config: ModelConfig, extra: bool) -> None:
    """Ours -> config.json -> transformers -> its own config.json -> ours: the same model everywhere."""
    values = hf_config(config)
    assert model_config_from_hf(values) == config
    theirs = transformers.AutoConfig.for_model(**values)
    assert ModelConfig(**semantics(theirs)) == config
    written = json.loads(theirs.to_json_string())
    assert model_config_from_hf(written) == config
    assert interpret(written).notes == interpret(values).notes == ()
    assert hf_config(config, written) == written


@SETTINGS
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_original_of_another_shape_is_updated(data: st.DataObject, family: str) -> None:
    """Whatever differs is overwritten, so that the result is this model and not the original's."""
    old, new = (data.draw(model_configs((family,))) for _ in range(2))
    written = json.loads(transformers.AutoConfig.for_model(**hf_config(old)).to_json_string()) | {"mine": 1}
    values = hf_config(new, written, "bfloat16")
    assert model_config_from_hf(values) == new and values["mine"] == 1 and values["dtype"] == "bfloat16"
    assert ModelConfig(**semantics(transformers.AutoConfig.for_model(**values))) == new


@SETTINGS
@given(config=model_configs())
def test_map_names_every_parameter(config: ModelConfig) -> None:
    """The table against the module itself: names and shapes, nothing more, nothing less."""
    import torch

    with torch.device("meta"):
        model = DecoderLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {p.name: p.shape for p in parameters(config).values()} | expert_biases(config) == expected


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("qwen")])
def test_published_presets_survive(name: str) -> None:
    config = ModelConfig(**PRESETS[name])
    assert model_config_from_hf(hf_config(config)) == config


@pytest.mark.parametrize(
    "values, theta",
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 5e5}, 7e4),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_scaling": {"type": "default", "rope_theta": 3e3}, "rope_parameters": {"rope_theta": 9e9}}, 3e3),
        ({"rope_parameters": {}}, 1e4),
        ({}, 1e4),
    ],
)
def test_rope_theta(values: dict[str, Any], theta: float) -> None:
    """Old and new names, and transformers itself as the judge of which one counts."""
    given_values = minimal("qwen3", **values)
    assert model_config_from_hf(json.loads(json.dumps(given_values))).rope_theta == theta
    assert transformers.AutoConfig.for_model(**given_values).rope_parameters["rope_theta"] == theta


def test_both_names_of_the_expert_count() -> None:
    for values in ({"num_experts": 7}, {"num_local_experts": 7}, {"num_experts": 7, "num_local_experts": 7}):
        assert model_config_from_hf(minimal("qwen3_moe", num_experts_per_tok=2, **values)).num_experts == 7
    config = model_config_from_hf(minimal("qwen3_moe"))
    assert hf_config(config)["num_experts"] == hf_config(config)["num_local_experts"] == 128


def test_nulls_and_layers_that_do_not_exist() -> None:
    values = minimal(mlp_only_layers=None, num_key_value_heads=None, head_dim=None, rope_theta=None)
    config = model_config_from_hf(values)
    assert config.mlp_only_layers == () and config.num_key_value_heads == 16 and config.head_dim == 128
    found = interpret(minimal(mlp_only_layers=[3, 24, -1]))
    assert found.config.mlp_only_layers == (3,) and any("[24, -1]" in note for note in found.notes)


def test_unknown_keys_are_said() -> None:
    assert interpret(minimal(rope_theta=1e6, made_up=3)).notes[-1] == "not used: made_up"


def test_a_rope_scaling_without_a_type_is_said() -> None:
    """transformers reads it as no scaling."""
    values = minimal(rope_theta=1e6, rope_scaling={"factor": 4.0})
    assert transformers.AutoConfig.for_model(**values).rope_parameters["rope_type"] == "default"
    found = interpret(minimal(rope_theta=1e6, rope_scaling={"factor": 4.0}))
    assert found.config.rope_scaling is None
    assert found.notes[0].startswith("not used in rope_scaling: factor (it names no type")


def test_keys_without_effect_are_accepted_in_silence() -> None:
    inside = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": None}
    plain = interpret(minimal(rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    assert interpret(minimal(rope_parameters=inside, partial_rotary_factor=1.0, is_causal=True)) == plain


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            r"LlamaForCausalLM.*Qwen2ForCausalLM, Qwen2Moe",
        ),
        ({"architectures": ["Qwen2ForTokenClassification"]}, "not supported: supported are Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": "qwen3_moe"}, "Qwen2MoeForCausalLM but model_type 'qwen3_moe'"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 4.0}},
            "type 'llama3': supported are linear, dynamic, yarn",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "type linear needs a factor"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}},
            "rope_parameters.factor is 0.5: .* greater than or equal to 1",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "beta_fast": 1}}, "beta_fast 1 is not above beta_slow 1"),
        ({"rope_scaling": {"rope_type": "yarn", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5: only 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of RoPE parameters"),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "partial_rotary_factor is 0.5: only 1",
        ),
        ({"is_causal": False}, "is_causal is false, .* only causal"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entry but num_hidden_layers is 24"),
        ({"hidden_size": "2048"}, "hidden_size is '2048', expected a number"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob is 'false', expected true or false"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4.0"}}, "rope_scaling.factor is '4.0', .* quotation marks"),
        ({"use_sliding_window": True}, "gives 12 of 24 layers a sliding window .* only full attention is supported"),
        ({"use_sliding_window": True, "max_window_layers": "3"}, 'max_window_layers is "3", expected a whole number'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
        ({"num_experts": 8, "num_local_experts": 16}, "num_experts is 8 but num_local_experts is 16"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok 61 is larger than num_experts 60"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"decoder_sparse_step": 100}, "no layer is MoE"),
        ({"dtype": []}, r"dtype is \[\], expected a string"),
        ({"torch_dtype": 16}, "torch_dtype is 16, expected a string"),
        ({"model_type": ["qwen2_moe"]}, "model_type is .*, expected a string"),
        ({"architectures": "Qwen2MoeForCausalLM"}, "architectures is .*, expected a list"),
        ({"architectures": [["Qwen2MoeForCausalLM"]]}, "architectures is .*, expected a list of names"),
        ({"quantization_config": 5}, "quantization_config is 5, expected a mapping"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list"),
        ({"mlp_only_layers": ["1"]}, "expected a list of layers' indices"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3, expected a list"),
        ({"num_experts": [60]}, r"num_experts is \[60\], expected a number"),
        ({"num_experts": True}, "num_experts is True, expected a number"),
        ({"rope_theta": {}}, "rope_theta is {}, expected a number"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta is '1e6', expected a number"),
        ({"use_sliding_window": "false"}, "use_sliding_window is 'false', expected true or false"),
        ({"rms_norm_eps": True}, "rms_norm_eps: true is not a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: Input should be less than or equal to 10000"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000: Input should be less than or equal to 2147483647"),
        ({"hidden_size": 10**400}, "hidden_size = 1000"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_config_from_hf(minimal() | values, "somewhere/config.json")
    assert "somewhere/config.json" in str(caught.value)


def test_published_config_files() -> None:
    """The text of Qwen1.5-MoE-A2.7B's published config.json gives the preset of that name."""
    published = """{"architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}"""
    found = interpret(json.loads(published))
    assert found.config == ModelConfig(**PRESETS["qwen1.5-moe-a2.7b"])
    assert [note for note in found.notes if "qkv_bias=True" not in note] == []


def test_message_names_the_file(tmp_path: Path) -> None:
    from qwen_moe.checkpoint.huggingface.convert import from_pretrained

    (tmp_path / "config.json").write_text(json.dumps(minimal(hidden_act="relu")))
    with pytest.raises(UserError, match=str(tmp_path / "config.json")):
        from_pretrained(tmp_path)
