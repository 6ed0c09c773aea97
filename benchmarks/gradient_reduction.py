"""What a rank holds with `parallel.gradient_reduction` last and every: the most bytes that a step's forward and backward
allocate, in gloo ranks on this machine.

    python benchmarks/gradient_reduction.py [--ranks 8]
"""

import argparse
from typing import Any

from parallel.local_group import preload, run_local
from qwen_moe.config import RunConfig, parse_config

# 20 million parameters, of which experts are 19 million: large beside the activations of 64 tokens.
MODEL: dict[str, Any] = {
    "family": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}


def recipe(ranks: int, schedule: str, reduction: str) -> RunConfig:
    """A bf16 run with eight micro-batches of one sequence; ``schedule`` runs two pipeline stages, empty none."""
    dp = ranks // (2 if schedule else 1)
    parallel: dict[str, Any] = {"gradient_reduction": reduction}
    return parse_config(
        {
            "run_dir": "unused",
            "model": MODEL,
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 64},
            "training": {"train_tokens": 64 * 8 * dp, "micro_batch_size": 1, "global_batch_size": 8 * dp},
            "optimizer": {"learning_rate": 1e-4},
            "precision": {"compute": "bf16"},
            "parallel": parallel | ({"pp": 2, "schedule": schedule} if schedule else {}),
        },
        "benchmark",
    )


def peak(config: RunConfig) -> int:
    """Most bytes that the second step's forward and backward allocate on this rank."""
    from qwen_moe.planning.live_bytes import LiveBytes
    from qwen_moe.verify.ranks import Report, make_trainer, micro_batches, record_step

    trainer = make_trainer(config)
    record_step(trainer, Report(), 0)
    batches = micro_batches(trainer, 0)
    trainer.begin_step(1, 1)
    with LiveBytes() as live:
        trainer.engine.forward_backward(batches)
    return live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    ranks = parser.parse_args().ranks
    preload(["qwen_moe.verify.ranks"])
    print("| schedule | last, MB | every, MB | ratio |\n|---|---|---|---|")
    for schedule in ("", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"):
        last, every = (
            max(run_local(peak, ranks, recipe(ranks, schedule, reduction), timeout=3000)) / 1e6
            for reduction in ("last", "every")
        )
        print(f"| {schedule or 'no pipeline'} | {last:.1f} | {every:.1f} | {every / last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
