"""The model families, one row of features each. Other code asks for a feature, never for a family's name.

A new combination of these features is one more row; see "How to add a model family" in CONTRIBUTING.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """The features that all models of a family share.

    ``architecture``: Hugging Face's class, as `architectures` in config.json names it.
    ``moe``: some feed-forward layers are mixtures of experts; otherwise all are dense.
    ``shared_expert``: every MoE layer has a shared expert behind a sigmoid gate; otherwise none has.
    ``qk_norm``: each head of q and k is normalized before RoPE.
    ``qkv_bias``: the default for whether q, k and v have biases.
    ``qkv_bias_key``: the key of config.json for this; empty if Hugging Face has none, so that ``qkv_bias`` holds for every
    model of the family.
    ``o_bias``: the output projection has a bias if q, k and v have.
    ``windows``: which layers have a sliding window in transformers if `use_sliding_window` is true: those that `layer_types`
    names, or without it those from `max_window_layers` on ("upper") or every second of those before it ("lower"); or all
    layers whatever these keys say ("all").
    ``expert_count_keys``: the keys of config.json to which the number of experts is written.
    ``defaults``: transformers' values for keys that config.json lacks, by our names, without ``qkv_bias``.
    """

    architecture: str
    moe: bool
    shared_expert: bool
    qk_norm: bool
    qkv_bias: bool
    qkv_bias_key: str
    o_bias: bool
    windows: Literal["upper", "lower", "all"] = "upper"
    expert_count_keys: tuple[str, ...]
    defaults: Mapping[str, Any]

    @property
    def classifier(self) -> str:
        """Hugging Face's class of a reward model of this family."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")

    @property
    def hf_defaults(self) -> dict[str, Any]:
        """transformers' values for keys that config.json lacks, for every setting that it reads there. The number of experts
        is always under `num_experts`."""
        bias = {self.qkv_bias_key: self.qkv_bias} if self.qkv_bias_key else {}
        return dict(self.defaults) | bias


_EVERY_FAMILY = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_DENSE = _EVERY_FAMILY | {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_MOE = _EVERY_FAMILY | {"decoder_sparse_step": 1, "norm_topk_prob": False}

# By Hugging Face's model_type. Tests compare architectures and defaults with transformers.
FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        moe=False,
        shared_expert=False,
        qk_norm=False,
        qkv_bias=True,
        qkv_bias_key="",
        o_bias=False,
        expert_count_keys=(),
        defaults=_DENSE,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        moe=True,
        shared_expert=True,
        qk_norm=False,
        qkv_bias=True,
        qkv_bias_key="qkv_bias",
        o_bias=False,
        windows="lower",
        expert_count_keys=("num_experts",),
        defaults=_MOE
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
        },
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        moe=False,
        shared_expert=False,
        qk_norm=True,
        qkv_bias=False,
        qkv_bias_key="attention_bias",
        o_bias=True,
        expert_count_keys=(),
        defaults=_DENSE | {"head_dim": 128},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        moe=True,
        shared_expert=False,
        qk_norm=True,
        qkv_bias=False,
        qkv_bias_key="attention_bias",
        o_bias=True,
        windows="all",
        expert_count_keys=("num_experts", "num_local_experts"),  # the names in transformers 4 and 5
        defaults=_MOE
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
    ),
}


def families_that(have: Callable[[Family], bool]) -> str:
    """The names of the families for which ``have`` is true, for a message."""
    return ", ".join(name for name, family in FAMILIES.items() if have(family))
