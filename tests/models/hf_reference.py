"""transformers' models in true float64 with our weights, and random small configs of every family."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import torch
import transformers
from torch.overrides import TorchFunctionMode

from qwen_moe.checkpoint.huggingface.config import hf_config
from qwen_moe.config import ModelConfig
from qwen_moe.config import families as table
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model

FAMILIES = tuple(table.FAMILIES)


class _Float64(TorchFunctionMode):
    """transformers casts norms, RoPE, attention and router softmax to float32; here float32 means float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


@contextmanager
def true_float64() -> Iterator[None]:
    """Everything inside that asks for float32 gets float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def draw_weights(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64) -> DecoderLM:
    """Our model with every parameter random, norms and biases included: at their initial values they hide mistakes."""
    model = build_model(config, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(offset + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    return model


def to_hf_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the names and shapes of transformers 5 in memory; written apart from the converter's map."""
    return {
        name: tensor.flatten(1, 2) if name.endswith("experts.gate_up_proj") else tensor
        for name, tensor in tensors.items()
        if not name.endswith("expert_bias")
    }


def hf_model(ours: DecoderLM, **config_changes: Any) -> Any:
    """transformers' model of the same config and weights, in ours' dtype. Build it under `true_float64` for float64."""
    values = hf_config(ours.config) | config_changes
    architecture = values["architectures"][0]
    config = transformers.AutoConfig.for_model(**values)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = getattr(transformers, architecture)(config).to(ours.model.norm.weight.dtype).eval()
    missing, unexpected = model.load_state_dict(to_hf_names(dict(ours.state_dict())), strict=False)
    assert unexpected == [] and set(missing) <= ({"lm_head.weight"} if ours.config.tied_head else set())
    return model


@st.composite
def rope_scalings(draw: st.DrawFn, head_dim: int, long: bool) -> dict[str, Any]:
    """No scaling, or one of each type whose effect shows on texts of a few tokens."""
    kind = draw(st.sampled_from([None, None, "linear", "dynamic", "yarn", "yarn"]))
    factor = draw(st.sampled_from([1.0, 1.5, 4.0]))
    if kind is None or (kind == "dynamic" and (long or head_dim == 2)):
        return {"max_position_embeddings": 64}
    if kind != "yarn":
        length = 3 if kind == "dynamic" else 64  # beyond which dynamic has an effect
        return {"max_position_embeddings": length, "rope_scaling": {"type": kind, "factor": factor}}
    changes = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "original_max_position_embeddings": st.sampled_from([16, 40]),
                "attention_factor": st.sampled_from([0.7, 1.3]),
                "beta_fast": st.sampled_from([2.5, 8.0]),
                "beta_slow": st.sampled_from([0.1, 0.5]),
                "mscale": st.sampled_from([0.5, 1.0]),
                "mscale_all_dim": st.sampled_from([0.3, 1.0]),
                "truncate": st.booleans(),
            },
        )
    )
    if draw(st.booleans()) or "original_max_position_embeddings" not in changes:
        changes["factor"] = factor
    return {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", **changes}}


@st.composite
def model_configs(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES, long: bool = False) -> ModelConfig:
    """A random small shape, awkward sizes on purpose, one of ``families``. ``long``: reads at least 64 tokens."""
    family = draw(st.sampled_from(families))
    features = table.FAMILIES[family]
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 6))
    independent = draw(st.booleans())
    layers = draw(st.integers(1, 4))
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": draw(st.integers(11, 60)),
        "hidden_size": draw(st.integers(3, 24)) if independent else heads * head_dim,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **draw(rope_scalings(head_dim, long)),
        "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 1_000_000.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()) if features.qkv_bias_key else features.qkv_bias,
    }
    if features.moe:
        experts = draw(st.integers(1, 9))
        step = draw(st.sampled_from([1, 1, 2])) if layers > 1 else 1
        sparse = [layer for layer in range(layers) if (layer + 1) % step == 0]
        values |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(st.integers(1, 20)),
            "norm_topk_prob": draw(st.booleans()),
            "decoder_sparse_step": step,
            "mlp_only_layers": tuple(draw(st.sets(st.sampled_from(sparse), max_size=len(sparse) - 1))),
        }
        if features.shared_expert:
            values["shared_expert_intermediate_size"] = draw(st.integers(1, 20))
    return ModelConfig(**values)
