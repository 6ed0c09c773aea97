"""A family that is added as a row of the table alone works in configs, models, counts, Hugging Face files and layouts."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from parallel.mesh import Layout
from qwen_moe.checkpoint.huggingface.config import hf_config, interpret, model_config_from_hf
from qwen_moe.checkpoint.huggingface.convert import from_pretrained, save_pretrained
from qwen_moe.checkpoint.huggingface.names import expert_biases, parameters
from qwen_moe.config import parse_config
from qwen_moe.config.families import FAMILIES, Family
from qwen_moe.errors import UserError
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.flops import count_parameters, flops_per_token
from qwen_moe.models.init import build_model
from qwen_moe.scaling.ladder import smaller_models
from qwen_moe.verify.case import draw, shrink
from qwen_moe.verify.shapes import run_shapes
from tests.checkpoint.huggingface.directories import by_transformers, convert, files_of, tensors_on_disk
from tests.models.hf_reference import draw_weights, hf_model, model_configs, true_float64
from tests.models.test_transformers_parity import TOLERANCE, differences, relative, worst
from tests.small import small_model

SETTINGS = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NEW = {
    # Known to transformers: no QK-norm, and biases on q, k, v and o or on none.
    "llama": Family(
        architecture="LlamaForCausalLM",
        moe=False,
        shared_expert=False,
        qk_norm=False,
        qkv_bias=False,
        qkv_bias_key="attention_bias",
        o_bias=True,
        expert_count_keys=(),
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
    ),
    # Made up: QK-norm and always biases, on q, k and v alone.
    "made_up": Family(
        architecture="MadeUpForCausalLM",
        moe=False,
        shared_expert=False,
        qk_norm=True,
        qkv_bias=True,
        qkv_bias_key="",
        o_bias=False,
        expert_count_keys=(),
        defaults=FAMILIES["qwen3"].defaults,
    ),
    # Made up: experts, a shared expert, QK-norm, and biases on q, k, v and o under a key of its own.
    "made_up_experts": Family(
        architecture="MadeUpExpertsForCausalLM",
        moe=True,
        shared_expert=True,
        qk_norm=True,
        qkv_bias=True,
        qkv_bias_key="use_bias",
        o_bias=True,
        expert_count_keys=("num_local_experts",),
        defaults=FAMILIES["qwen2_moe"].defaults,
    ),
}


@pytest.fixture(autouse=True)
def new_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row in NEW.items():
        monkeypatch.setitem(FAMILIES, name, row)


def names_with(model: DecoderLM, part: str) -> set[str]:
    return {name.partition("self_attn.")[2] for name in model.state_dict() if part in name and "self_attn." in name}


QKV_BIASES = {f"{name}_proj.bias" for name in "qkv"}
QK_NORMS = {"q_norm.weight", "k_norm.weight"}


@pytest.mark.parametrize(
    ("family", "changes", "biases", "norms"),
    [
        ("llama", {}, set(), set()),
        ("llama", {"qkv_bias": True}, QKV_BIASES | {"o_proj.bias"}, set()),
        ("made_up", {}, QKV_BIASES, QK_NORMS),
        ("made_up_experts", {}, QKV_BIASES | {"o_proj.bias"}, QK_NORMS),
        ("made_up_experts", {"qkv_bias": False}, set(), QK_NORMS),
    ],
)
def test_the_model_has_the_features_of_its_row(
    family: str, changes: dict[str, object], biases: set[str], norms: set[str]
) -> None:
    config = small_model(family, **changes)
    model = build_model(config, 0, torch.float32)
    assert names_with(model, "bias") == biases and names_with(model, "norm") == norms
    assert {p.name: p.shape for p in parameters(config).values()} | expert_biases(config) == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    counts = count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    flops = flops_per_token(config, 1)  # one token sees itself: every other FLOP is 2 for each weight of a matrix
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1) - model.model.embed_tokens.weight.numel()
    idle = (config.num_experts - config.num_experts_per_tok) * 3 * 16 * config.moe_intermediate_size * 2
    assert flops.forward - flops.attention_scores == 2 * (matrices - idle)


@SETTINGS
@given(data=st.data())
def test_a_family_that_transformers_knows_equals_it(data: st.DataObject) -> None:
    config = data.draw(model_configs(("llama",)))
    assume(config.hidden_size % config.num_attention_heads == 0)  # transformers refuses others, though it has head_dim
    value, name = worst(differences(draw_weights(config, 3), 3, 2, data.draw(st.integers(2, 17))))
    assert value < TOLERANCE, (name, value)
    theirs = transformers.AutoConfig.for_model(**hf_config(config))
    assert isinstance(theirs, transformers.LlamaConfig) and theirs.attention_bias == config.qkv_bias
    assert model_config_from_hf(json.loads(theirs.to_json_string())) == config
    theirs = transformers.LlamaConfig()
    assert NEW["llama"].hf_defaults.items() <= theirs.to_dict().items()


def test_biases_beside_qk_norm_equal_transformers() -> None:
    """transformers' Qwen3 has both, with a bias on o, which is 0 here."""
    ours = draw_weights(small_model("made_up"), 5)
    like = draw_weights(small_model("made_up").model_copy(update={"family": "qwen3"}), 6)
    missing, unexpected = like.load_state_dict(ours.state_dict(), strict=False)
    assert {name.partition("self_attn.")[2] for name in missing} == {"o_proj.bias"} and unexpected == []
    for layer in like.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    ids = torch.arange(24).view(2, 12)
    with true_float64():
        assert relative(ours(ids), hf_model(like)(input_ids=ids).logits) < TOLERANCE


def test_experts_beside_qk_norm_and_biases_equal_transformers() -> None:
    """transformers' Qwen3-MoE has all but the shared expert, which adds 0 here."""
    ours = draw_weights(small_model("made_up_experts"), 5)
    for layer in ours.model.layers:
        layer.mlp.shared_expert.down_proj.weight.data.zero_()
    config = small_model("made_up_experts").model_copy(
        update={"family": "qwen3_moe", "shared_expert_intermediate_size": 0}
    )
    like = draw_weights(config, 6)
    missing, unexpected = like.load_state_dict(ours.state_dict(), strict=False)
    assert missing == [] and all(".shared_expert" in name for name in unexpected) and unexpected
    ids = torch.arange(24).view(2, 12)
    with true_float64():
        assert relative(ours(ids), hf_model(like)(input_ids=ids).logits) < TOLERANCE


@pytest.mark.parametrize("family", NEW)
@SETTINGS
@given(data=st.data())
def test_config_json_both_ways(family: str, data: st.DataObject) -> None:
    old, new = (data.draw(model_configs((family,))) for _ in range(2))
    values = hf_config(new)
    assert values["architectures"] == [NEW[family].architecture] and values["model_type"] == family
    found = interpret(json.loads(json.dumps(values)))
    assert found.config == new and found.notes == ()
    assert hf_config(new, hf_config(old) | {"mine": 1}) == values | {"mine": 1}
    assert ("num_experts" in values, "num_local_experts" in values) == (False, NEW[family].moe)
    assert values.get("use_bias") == (new.qkv_bias if family == "made_up_experts" else None)
    del values["architectures"]
    assert model_config_from_hf(values) == new
    absent = interpret({"architectures": [NEW[family].architecture]})
    assert absent.config.qkv_bias == NEW[family].qkv_bias


@pytest.mark.parametrize("family", NEW)
def test_directories_and_checkpoints_both_ways(family: str, tmp_path: Path) -> None:
    ours = draw_weights(small_model(family), 3, torch.float32)
    hf = tmp_path / "hf"
    if family == "llama":
        by_transformers(hf, ours, torch.float32)
    else:
        save_pretrained(ours, hf)
    assert convert("from-hf", hf, tmp_path / "checkpoint") == 0
    assert convert("to-hf", tmp_path / "checkpoint", tmp_path / "back") == 0
    assert files_of(hf) == files_of(tmp_path / "back")
    read = from_pretrained(tmp_path / "checkpoint")
    assert read.config == ours.config
    assert {name: (tensor.shape, tensor.sum().item()) for name, tensor in tensors_on_disk(read).items()} == {
        name: (tensor.shape, tensor.sum().item()) for name, tensor in tensors_on_disk(ours).items()
    }


@pytest.mark.parametrize("family", NEW)
def test_recipes_layouts_and_ladders(family: str) -> None:
    model = small_model(family, num_hidden_layers=24, hidden_size=512, num_attention_heads=32, num_key_value_heads=16)
    config = parse_config(
        {
            "run_dir": "unused",
            "model": model.model_dump(),
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 64},
            "training": {"train_tokens": 10_000, "micro_batch_size": 2, "global_batch_size": 4},
            "optimizer": {"learning_rate": 1e-3},
            "balance": {"scope": "micro_batch" if NEW[family].moe else "none"},
        },
        "recipe",
    )
    assert config.model == model
    small = shrink(config, Layout(tp=2, pp=2, ep=2 if NEW[family].moe else 1))
    for feature in ("family", "qkv_bias", "o_bias", "qk_norm", "is_moe_family"):
        assert getattr(small.model, feature) == getattr(model, feature)
    for rank in range(4):
        report = run_shapes(small, 4, rank)
        assert report.gradients == report.parameters > 0
    assert {found.family for found in smaller_models(model)} == {family}
    assert family in {draw(0, index, 4)[0].model.family for index in range(100)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "made_up", "qkv_bias": False}, "must be true for family made_up: .*MadeUpForCausalLM always has"),
        ({"family": "made_up", "num_experts": 4}, r"made_up is dense.*\(qwen2_moe, qwen3_moe, made_up_experts\)"),
        ({"family": "llama", "shared_expert_intermediate_size": 4}, r"one \(qwen2_moe, made_up_experts\)"),
        ({"family": "made_up_experts", "shared_expert_intermediate_size": 0}, r"that has none \(qwen3_moe\)"),
        ({"family": "made_up_experts", "mlp_only_layers": [0, 1]}, r"dense family \(qwen2, qwen3, llama, made_up\)"),
        ({"family": "mistral"}, "'mistral' is not a model family: give one of qwen2, .*, made_up_experts"),
        ({"family": "x" * 10_000}, "'x{100}' is not a model family"),
        ({"family": 3}, "model.family = 3"),
    ],
)
def test_messages_name_the_families_of_the_table(values: dict[str, object], message: str) -> None:
    base = small_model(str(values["family"]) if values["family"] in NEW else "llama").model_dump()
    recipe = {"run_dir": "x", "model": base | values}
    with pytest.raises(UserError, match=message) as caught:
        parse_config(recipe, "recipe")
    assert len(str(caught.value)) < 1500
