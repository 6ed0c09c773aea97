"""Named model shapes: published Qwen sizes, our Turbo- and Plus-style ones, and the demo's.

Published shapes come from the models' own `config.json`. Qwen2.5-Turbo and Qwen2.5-Plus are MoE models whose sizes were
never published (arXiv 2412.15115, section 2 says only that fine-grained and shared experts replace the dense feed-forward
layers). Our shapes for them are choices:

* both take Qwen2.5's vocabulary (151,936: divisible by 128, so it splits evenly over any usual tensor-parallel degree
  without further padding), QKV bias, RoPE base 1,000,000 and 32,768 native positions;
* experts are fine-grained (arXiv 2401.06066): 64 per layer, each an eighth (Turbo) or about an eleventh (Plus) of the
  dense feed-forward width, 8 of them active, plus one gated shared expert as wide as 4 routed ones. A third of the
  activated feed-forward is thus always on, so that not every expert has to learn common knowledge;
* `turbo_style` (17.5B total, 3.9B activated) is sized to serve at the cost of Qwen2.5-3B and to fit one 80 GB GPU in
  bf16; `plus_style` (133B total, 27B activated) has an activated size between Qwen2.5-14B and 32B and a total between
  the 72B dense model and Qwen3-235B-A22B;
* widths are multiples of 128 (FP8 blocks, tensor-parallel degrees up to 8), layer counts even (pipeline stages), and
  8 KV heads allow tensor parallelism of 8 without replicating KV.
"""

import difflib
from typing import Any

from qwen_moe.errors import UserError


def _qwen25(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> dict[str, Any]:
    return {
        "family": "qwen2",
        "vocab_size": 152064,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        **changes,
    }


_SMALL = {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen25(896, 4864, 24, 14, 2, **_SMALL),
    "qwen2.5-1.5b": _qwen25(1536, 8960, 28, 12, 2, **_SMALL | {"max_position_embeddings": 131072}),
    "qwen2.5-3b": _qwen25(2048, 11008, 36, 16, 2, **_SMALL),
    "qwen2.5-7b": _qwen25(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen25(5120, 13824, 48, 40, 8, rms_norm_eps=1e-5),
    "qwen2.5-32b": _qwen25(5120, 27648, 64, 40, 8, rms_norm_eps=1e-5),
    "qwen2.5-72b": _qwen25(8192, 29568, 80, 64, 8, rms_norm_eps=1e-5),
    "qwen1.5-moe-a2.7b": {
        "family": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "rope_theta": 1_000_000.0,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen2-57b-a14b": {
        "family": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
    },
    "qwen3-30b-a3b": {
        "family": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1_000_000.0,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "qwen3-235b-a22b": {
        "family": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1_000_000.0,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
    },
    "turbo_style": {
        "family": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": True,
    },
    "plus_style": {
        "family": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 10240,
        "norm_topk_prob": True,
    },
    "demo": {
        "family": "qwen2_moe",
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "norm_topk_prob": True,
    },
}


_SHORT = {"max_position_embeddings": 32768}
# Published variants of a preset: the same parameters with other settings from their config.json.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}-base": (name, {}) for name in PRESETS if name.startswith(("qwen1.5", "qwen2"))},
    **{f"{name}-instruct": (name, _SHORT | {"rms_norm_eps": 1e-6}) for name in PRESETS if name.startswith("qwen2.5")},
    "qwen2-57b-a14b-instruct": ("qwen2-57b-a14b", _SHORT),
    "qwen3-30b-a3b-base": ("qwen3-30b-a3b", _SHORT),
}


def _plain(name: str) -> str:
    """Bring a pasted name or address into the form of preset names: the model's own part, in lower case."""
    name = name.strip().lower().removeprefix("https://").removeprefix("huggingface.co/").strip("/")
    return name.removeprefix("qwen/")


def is_preset(name: str) -> bool:
    """Whether `preset_values` knows ``name``."""
    return _plain(name) in PRESETS or _plain(name) in _VARIANTS


def preset_values(name: str) -> dict[str, Any]:
    """A copy of the fields of preset ``name``, in any case, with or without `Qwen/`. Raises UserError naming the nearest."""
    plain = _plain(name)
    if plain in _VARIANTS:
        base, changes = _VARIANTS[plain]
        return PRESETS[base] | changes
    if plain not in PRESETS:
        known = [*PRESETS, *_VARIANTS]
        near = [one for one in known if plain.startswith(one)] or difflib.get_close_matches(plain[:100], known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(PRESETS)}"
        shown = repr(name) if len(name) <= 100 else f"{name[:100]!r}..."
        raise UserError(f"unknown preset {shown}; {hint}")
    return dict(PRESETS[plain])
