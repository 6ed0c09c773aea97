"""What parallelism costs: the step of ep=2, tp=2 and pp=2 against dp=2, on two local processes at one global batch.

    python benchmarks/parallel_overhead.py [--rounds 7] [--layouts "tp=2, 2 rows"] [--json]

All layouts live in the same two processes and take turns, so that a drifting machine slows them alike. For pipelines,
the share of a step in which a rank waits for a neighbour is measured too, beside the ideal bubble of its schedule.
``--layouts``: only these, and dp=2.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from parallel.heap import keep_freed_memory
from parallel.local_group import preload, run_local
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.models.ops.compiled import compile_kernels
from qwen_moe.verify.ranks import make_trainer, micro_batches

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp=2": {},
    "dp=2 zero3": {"sharding": "zero3"},
    "ep=2": {"ep": 2},
    "etp=2": {"etp": 2},
    "tp=2": {"tp": 2},
    "tp=2, 2 rows": {"tp": 2, "rows": 2},  # as many activations on a rank as with dp=2
    "tp=2 ep=2": {"tp": 2, "ep": 2},
    "pp=2 1f1b": {"pp": 2},
    "pp=2 interleaved_1f1b": {"pp": 2, "schedule": "interleaved_1f1b"},
    "pp=2 zbv": {"pp": 2, "schedule": "zbv"},
    "pp=2 dualpipev": {"pp": 2, "schedule": "dualpipev"},
}


def config_for(layout: dict[str, Any], precision: str) -> RunConfig:
    """8 sequences of 512 tokens a step, ``rows`` of ``layout`` at a time; 60 M parameters, 20 M of them activated."""
    parallel = {name: value for name, value in layout.items() if name != "rows"}
    return parse_config(
        {
            "run_dir": "unused",
            "model": {
                "family": "qwen2_moe",
                "vocab_size": 8192,
                "hidden_size": 512,
                "intermediate_size": 1024,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 256,
                "shared_expert_intermediate_size": 512,
                "norm_topk_prob": True,
            },
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 512},
            "training": {"train_tokens": 10**6, "micro_batch_size": layout.get("rows", 1), "global_batch_size": 8},
            "optimizer": {"learning_rate": 1e-4},
            "precision": {"compute": precision, "master": "fp32"},
            "parallel": parallel,
        },
        "benchmark",
    )


def measure(names: list[str], rounds: int, precision: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round's step, and of waiting for neighbours in it, by layout. Runs in both ranks."""
    from torch.distributed.pipelining import schedules

    keep_freed_memory()
    compile_kernels(True)
    waited = [0.0]
    wait = schedules._wait_batch_p2p

    def timed(work: Any) -> None:
        begin = time.perf_counter()
        wait(work)
        waited[0] += time.perf_counter() - begin

    schedules._wait_batch_p2p = timed
    trainers = {name: make_trainer(config_for(LAYOUTS[name], precision)) for name in names}
    batches = {name: micro_batches(trainer, 0) for name, trainer in trainers.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "wait": []} for name in names}
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():
            dist.barrier()
            waited[0] = 0.0
            begin = time.perf_counter()
            trainer.step(turn, batches[name])
            dist.barrier()
            if turn:  # the first is a warm-up
                found[name]["step"].append(time.perf_counter() - begin)
                found[name]["wait"].append(waited[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = ["dp=2", *(name for name in args.layouts if name != "dp=2")]
    from parallel.timeline import play

    preload(["qwen_moe.verify.ranks"])
    ranks = run_local(measure, 2, names, args.rounds, args.precision, timeout=3600)
    rows: list[dict[str, Any]] = []
    for name in names:
        parallel = LAYOUTS[name]
        # Against the dp=2 step of the same round.
        ratios = [a / b for a, b in zip(ranks[0][name]["step"], ranks[0]["dp=2"]["step"], strict=True)]
        row: dict[str, Any] = {
            "layout": name,
            "seconds": statistics.median(ranks[0][name]["step"]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
        if "pp" in parallel:
            shares = [w / s for rank in ranks for w, s in zip(rank[name]["wait"], rank[name]["step"], strict=True)]
            schedule = parallel.get("schedule", "1f1b")
            row["waiting"] = statistics.median(shares)
            row["ideal"] = play(schedule, 2, 8, 1 if schedule == "1f1b" else 2).idle_share
        rows.append(row)
    if args.json:
        print(json.dumps({"precision": args.precision, "torch": torch.__version__, "rows": rows}))
        return
    print(f"{'layout':24s} {'step':>8s} {'of dp=2':>8s} {'range':>13s} {'waiting':>8s} {'ideal':>7s}")
    for row in rows:
        waiting = f"{row['waiting']:8.1%} {row['ideal']:7.1%}" if "waiting" in row else ""
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        print(f"{row['layout']:24s} {row['seconds']:6.2f} s {row['ratio']:8.2f} {spread:>13s} {waiting}")


if __name__ == "__main__":
    main()
