"""Hand-made layouts and models that between them use every axis, schedule and feature."""

from typing import Any

from parallel.mesh import Layout
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.verify.case import STEPS, layout_overrides


def case(layout: Layout, **changes: Any) -> RunConfig:
    """A small qwen2_moe run in float64 for ``layout``; ``changes`` are ``section__key=value``."""
    sequence, wave = 12, 2 * layout.dp
    values: dict[str, Any] = {
        "run_dir": "unused",
        "seed": 7,
        "model": {
            "family": "qwen2_moe",
            "vocab_size": 37,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
        "data": {"train": [{"prefix": "unused"}], "sequence_length": sequence},
        "training": {"micro_batch_size": 2, "global_batch_size": wave * max(2, 2 * layout.pp), "loss_chunk_tokens": 7},
        "optimizer": {"learning_rate": 1e-2, "clip_grad_norm": 0.5, "eps": 1e-5},
        "balance": {"coefficient": 0.1, "z_loss_coefficient": 0.01, "bias_update_rate": 0.05},
        "precision": {"compute": "fp64", "master": "fp64"},
        "checkpoint": {"export_hf": False},
        "parallel": layout_overrides(layout),
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values[section][key] = value
    values["training"]["train_tokens"] = STEPS * values["training"]["global_batch_size"] * sequence
    return parse_config(values, "case")


QWEN3 = {"model__family": "qwen3_moe", "model__shared_expert_intermediate_size": 0}

# What is in each is in its name: what a user may combine and public trainers have got wrong.
CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "tp with fewer KV heads, QKV bias, odd vocabulary": (Layout(tp=4), {}),
    "tp with QK-norm and untied head": (Layout(tp=2), QWEN3 | {"model__tie_word_embeddings": False}),
    "ep over dp, experts without tokens": (Layout(dp=4, ep=4), {"model__num_experts": 64}),
    "ep over tp and dp, two expert copies": (Layout(tp=2, dp=4, ep=4), {}),
    "etp = tp, ep = 1": (Layout(tp=2, dp=2, etp=2), {}),
    "etp > tp": (Layout(dp=4, ep=2, etp=2), {}),
    "ep = 1 and etp = 1 under tp": (Layout(tp=2, dp=2), {}),
    "pp with a stage without MoE layers": (Layout(pp=2, dp=2, ep=2), {"model__mlp_only_layers": [0, 1]}),
    "interleaved, tied embeddings on two ranks": (
        Layout(pp=2, tp=2, ep=2),
        {"parallel__schedule": "interleaved_1f1b"},
    ),
    "zbv, tied embeddings on one rank": (Layout(pp=2, dp=2, ep=2), {"parallel__schedule": "zbv"}),
    "dualpipev with tp, recompute": (
        Layout(pp=2, tp=2, etp=2),
        {"parallel__schedule": "dualpipev", "training__recompute": "full"},
    ),
    "everything": (Layout(tp=2, pp=2, dp=2, ep=4), {"parallel__pipeline_split": [1, 3]}),
    "zero3 with ep and recompute": (
        Layout(dp=4, ep=2),
        {"parallel__sharding": "zero3", "training__recompute": "full", "balance__scope": "sequence"},
    ),
    "capacity with drops": (Layout(tp=2, dp=2, ep=2), {"balance__capacity_factor": 0.75}),
    "capacity with drops, etp": (Layout(tp=4, ep=2, etp=2), {"balance__capacity_factor": 0.5}),
    "documents": (Layout(tp=2, pp=2), {"data__respect_document_boundaries": True}),
    "micro-batch balancing over tp": (Layout(tp=2, dp=2, ep=4), {"balance__scope": "micro_batch"}),
    "transformers' balancing over tp": (Layout(tp=2, dp=2, ep=2), {"balance__scope": "huggingface"}),
}
