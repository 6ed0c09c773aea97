"""Hand-made layouts and models that between them use every axis, schedule and feature."""

from typing import Any

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.verify.case import layout_overrides
from tests.small import exact_run, model_values

STEPS = 2  # the second uses what the first has left: weights, moments, biases, buffers (`qwen-moe verify` does three)


def case(layout: Layout, steps: int = STEPS, **changes: Any) -> RunConfig:
    """A small qwen2_moe run in float64 of ``steps`` steps for ``layout``; ``changes`` are ``section__key=value``."""
    sequence = 12
    batch = changes.get("training__global_batch_size", 2 * layout.dp * max(2, 2 * layout.pp))
    model = model_values(
        vocab_size=37,
        intermediate_size=24,
        num_hidden_layers=4,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    own = {
        "seed": 7,
        "training__loss_chunk_tokens": 7,
        "training__global_batch_size": batch,
        "training__train_tokens": steps * batch * sequence,
        "balance__bias_update_rate": 0.05,
        "parallel": layout_overrides(layout),
    }
    return exact_run(model, sequence, **own | changes)


EVERY = {"parallel__gradient_reduction": "every"}
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
    "interleaved, one micro-batch for two ranks": (
        Layout(pp=2, dp=2, ep=2),
        {"parallel__schedule": "interleaved_1f1b", "training__global_batch_size": 4},
    ),
    "zbv, one micro-batch for two ranks": (
        Layout(pp=2, dp=2),
        {"parallel__schedule": "zbv", "training__global_batch_size": 4},
    ),
    "everything": (Layout(tp=2, pp=2, dp=2, ep=4), {"parallel__pipeline_split": [1, 3]}),
    "zero3 with ep and recompute": (
        Layout(dp=4, ep=2),
        {"parallel__sharding": "zero3", "training__recompute": "full", "balance__scope": "sequence"},
    ),
    "two experts on four ranks of edp, zero3": (
        Layout(dp=4),
        {"model__num_experts": 2, "model__num_experts_per_tok": 2, "parallel__sharding": "zero3"},
    ),
    "three experts on two ranks of edp, etp and zbv": (
        Layout(pp=2, dp=4, etp=2),
        {"model__num_experts": 3, "model__num_experts_per_tok": 2, "parallel__schedule": "zbv"},
    ),
    "six experts a rank on four of edp, recompute": (
        Layout(dp=8, ep=2),
        {"model__num_experts": 12, "training__recompute": "full"},
    ),
    "gradients reduced after every micro-batch": (Layout(dp=4, ep=2), EVERY | {"parallel__sharding": "zero3"}),
    "1f1b, gradients reduced after every micro-batch": (Layout(pp=2, tp=2, dp=2, ep=2), EVERY),
    "interleaved, gradients reduced after every micro-batch": (
        Layout(pp=2, dp=2),
        EVERY | {"parallel__schedule": "interleaved_1f1b", "parallel__sharding": "zero3"},
    ),
    "zbv, gradients reduced after every micro-batch": (Layout(pp=2, dp=2), EVERY | {"parallel__schedule": "zbv"}),
    "dualpipev, gradients reduced after every micro-batch": (
        Layout(pp=2, dp=2, ep=2),
        EVERY | {"parallel__schedule": "dualpipev", "training__recompute": "full"},
    ),
    "capacity with drops": (Layout(tp=2, dp=2, ep=2), {"balance__capacity_factor": 0.75}),
    "capacity with drops, etp": (Layout(tp=4, ep=2, etp=2), {"balance__capacity_factor": 0.5}),
    "documents": (Layout(tp=2, pp=2), {"data__respect_document_boundaries": True}),
    "micro-batch balancing over tp": (Layout(tp=2, dp=2, ep=4), {"balance__scope": "micro_batch"}),
    "transformers' balancing over tp": (Layout(tp=2, dp=2, ep=2), {"balance__scope": "huggingface"}),
}
