"""Recipes and random models that tests plan for."""

import random
from typing import Any

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.planning.layouts import Choice, legal_choices
from qwen_moe.sharding.layout import RunLayout


def values(model: dict[str, Any], sequence: int = 4096, **training: Any) -> dict[str, Any]:
    """A recipe's plain values."""
    defaults = {"train_tokens": 10**12, "micro_batch_size": 1, "global_batch_size": 1024}
    return {
        "run_dir": "unused",
        "model": model,
        "data": {"train": [{"prefix": "unused"}], "sequence_length": sequence},
        "training": defaults | training,
        "optimizer": {"learning_rate": 1e-4},
    }


def turbo_style(**training: Any) -> RunConfig:
    return parse_config(values({"preset": "turbo_style"}, **training), "test")


def random_model(rng: random.Random) -> dict[str, Any]:
    """Small shapes of all families, with sizes that do and do not divide evenly."""
    family = rng.choice(["qwen2", "qwen2_moe", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_moe"])
    heads = rng.choice([4, 8])
    model: dict[str, Any] = {
        "family": family,
        "vocab_size": rng.choice([1000, 2048, 4099]),
        "hidden_size": rng.choice([128, 192, 256]),
        "intermediate_size": rng.choice([384, 512]),
        "num_hidden_layers": rng.randint(4, 9),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([2, heads]),
        "head_dim": rng.choice([32, 64]),
        "tie_word_embeddings": rng.random() < 0.3,
    }
    if family.endswith("_moe"):
        model |= {
            "num_experts": rng.choice([8, 16]),
            "num_experts_per_tok": rng.choice([2, 4]),
            "moe_intermediate_size": rng.choice([64, 128]),
            "decoder_sparse_step": rng.choice([1, 1, 2]),
        }
    if family == "qwen2_moe":
        model["shared_expert_intermediate_size"] = rng.choice([128, 256])
    return model


def random_case(rng: random.Random) -> tuple[RunConfig, Choice, RunLayout, int]:
    """(recipe, legal choice, its layout, number of processes)."""
    gpus = rng.choice([1, 4, 8, 16, 64])
    config = parse_config(values(random_model(rng), rng.choice([256, 512]), global_batch_size=64), "test")
    # Grouped products need rows of 16 bytes; narrower experts run one by one, which shapes alone cannot.
    width = config.model.moe_intermediate_size
    found = [(c, layout) for c, layout in legal_choices(config, gpus, (1, 2)) if width // c.etp % 8 == 0]
    choice, layout = rng.choice(found)
    return config, choice, layout, gpus
