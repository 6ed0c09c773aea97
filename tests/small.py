"""The tiny model that tests share, and runs of it. A test changes what it is about and nothing else."""

from typing import Any

from qwen_moe.config import ModelConfig, RunConfig, parse_config
from qwen_moe.config.families import FAMILIES

VOCAB = 53

# Two MoE layers with a shared expert and grouped attention; sizes that differ where an exchange of two would not show.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_SHARED_EXPERT: dict[str, Any] = {"shared_expert_intermediate_size": 12}


def model_values(family: str = "qwen2_moe", **changes: Any) -> dict[str, Any]:
    """The ``model`` section, with experts and a shared one where ``family`` has them."""
    features = FAMILIES[family]
    experts = (_EXPERTS if features.moe else {}) | (_SHARED_EXPERT if features.shared_expert else {})
    return {"family": family} | _SHAPE | experts | changes


def small_model(family: str = "qwen2_moe", **changes: Any) -> ModelConfig:
    return ModelConfig(**model_values(family, **changes))


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``values`` of a recipe with ``changes`` by name: ``section__key``, or a key of the recipe itself."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for name, value in changes.items():
        section, separator, key = name.partition("__")
        if separator:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return values


def exact_run(model: dict[str, Any], sequence: int, **changes: Any) -> RunConfig:
    """A run in float64 whose steps tell one layout from another: a learning rate, clipping and losses that show."""
    values = {
        "run_dir": "unused",
        "model": model,
        "data": {"train": [{"prefix": "unused"}], "sequence_length": sequence},
        "training": {"micro_batch_size": 2, "global_batch_size": 8},
        # Where a gradient is near 0, AdamW's first update multiplies its rounding by learning_rate / eps: 1e6 at the
        # default eps, which would turn 1e-16 into 1e-10 and say nothing of the layout.
        "optimizer": {"learning_rate": 1e-2, "clip_grad_norm": 0.5, "eps": 1e-5},
        "balance": {"coefficient": 0.1, "z_loss_coefficient": 0.01},
        "precision": {"compute": "fp64", "master": "fp64"},
        "checkpoint": {"export_hf": False},
    }
    return parse_config(changed(values, changes), "test")
