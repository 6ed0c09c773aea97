"""A small walk through all of post-training, for tests: two layers, a few steps, and rewards that a model of chance gets."""

from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "family": "qwen2_moe",
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 256,
}


def recipe_values() -> dict[str, Any]:
    return {
        "run_dir": "run",
        "model": MODEL,
        "common": {
            "data": {"sequence_length": 128},
            "training": {"micro_batch_size": 1, "global_batch_size": 4, "validation_interval": 0},
            "optimizer": {"learning_rate": 0.01},
            "precision": {"compute": "fp32", "compile": "never"},
            "checkpoint": {"interval": 2},
            "launch": {"threads": 1},
        },
        "measure": {"queries": "held.jsonl", "rewards": ["format:[2-9]"], "max_new_tokens": 6, "shown": 3},
        "sft": {
            "data": {"prepare": {"input": ["tasks:addition:120"], "train_tokenizer": True, "vocab_size": 288}},
            "training": {"epochs": 4},
        },
        "rollout": {
            "queries": "tasks:addition:24",
            "rewards": ["format:[2-9]"],
            "samples": 6,
            "max_new_tokens": 12,
            "batch_size": 24,
        },
        "pairs": {"truncated": "rejected"},
        "dpo": {"training": {"epochs": 2}, "optimizer": {"learning_rate": 0.003}},
        "reward_model": {"training": {"epochs": 2}},
        "grpo": {
            "rollout": {
                "queries": ["tasks:addition:24"],
                "rewards": ["format:[2-9]"],
                "reward_model": "step",
                "variances": "step",
                "episodes": 3,
                "queries_per_episode": 4,
                "samples": 4,
                "max_new_tokens": 6,
            },
            "training": {"global_batch_size": 4},
            "optimizer": {"learning_rate": 0.003},
        },
    }


def write_recipe(folder: Path, values: dict[str, Any] | None = None) -> Path:
    """The recipe and its held-out queries, in ``folder``, which is where commands run."""
    lines = [f'{{"prompt": "{n}+{n + 5}=", "answer": {2 * n + 5}}}\n' for n in range(30)]
    (folder / "held.jsonl").write_text("".join(lines))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values() if values is None else values))
    return path
