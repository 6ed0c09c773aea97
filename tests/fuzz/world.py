"""A small world in which every verb has something to read: data, a run, exports, tables, ladders, launched runs.

All paths in it are relative to its root, so that a copy of it is as good; a draw damages a copy.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.server import Answer, Server
from tests.scaling_laws.data import synthetic

STEPS, SAVED_EVERY, TOKENS_PER_STEP = 6, 2, 2 * 16
MODEL: dict[str, Any] = {
    "family": "qwen2_moe",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 2048,
}
SITE = """\
[slurm]
account = "lab"
partition = "gpu"
nodes = 1
time = "1:00:00"
sbatch_args = ["mail-type=END"]

[setup]
commands = ["true"]

[environment]
NCCL_DEBUG = "WARN"

[hardware]
price_per_gpu_hour = 2.5
peak_tflops = 989.0

[preflight]
level = "quick"
timeout_seconds = 60

[survive]
hang_seconds = 30
max_restarts = 3
"""
GPU = """\
name: card
memory_gib: 79.1
reserved_gib: 4.0
peak_tflops: {bf16: 989.4, fp8: 1978.9}
memory_gb_per_second: 3350
nvlink_gb_per_second: 450
price_per_gpu_hour: 2.50
"""
NETWORK = "name: cable\ngb_per_second: 50\nlatency_us: 15\n"
# Slurm's commands as a quiet cluster of two nodes answers them.
COMMANDS = {
    "sbatch": "echo 4711",
    "squeue": "exit 0",
    "scancel": "exit 0",
    "sacctmgr": "exit 1",
    "sacct": "exit 1",
    "sinfo": "echo 'n1|idle|64|gpu:8'; echo 'n2|idle|64|gpu:8'",
    "scontrol": """case "$*" in
 "show partition -o") echo "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP Nodes=n[1-2]";;
 "show hostnames"*) shift 2; echo "$1" | tr ',' '\\n';;
 *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
esac""",
}


def _recipe(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_dir": "run",
        "model": dict(MODEL),
        "data": {
            "train": [{"prefix": "data/corpus"}],
            "tokenizer": "data/corpus-tokenizer",
            "sequence_length": 16,
            "split": "80,20,0",
        },
        "training": {
            "train_tokens": STEPS * TOKENS_PER_STEP,
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "validation_interval": 0,
            "validation_sequences": 2,
        },
        "optimizer": {"learning_rate": 0.01},
        "precision": {"compute": "fp32", "master": "fp32", "compile": "never"},
        "checkpoint": {"interval": SAVED_EVERY, "keep": 3, "export_hf": False},
        "logging": {"tensorboard": False, "expert_load_interval": 2},
        "launch": {"threads": 1},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return values


def _write_recipe(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(_recipe(**changes), sort_keys=False), encoding="utf-8")


class World:
    """What was built, where, and by whom."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server = root, server

    def run(self, *argv: str) -> Answer:
        answer = self.server.run(argv, self.root, 120, **self.environment(self.root))
        assert answer.code == 0, f"{' '.join(argv)}\n{answer.out}\n{answer.err}"
        return answer

    @staticmethod
    def environment(root: Path) -> dict[str, str]:
        return {"PATH": f"{root}/bin{os.pathsep}{os.environ['PATH']}", "XDG_CONFIG_HOME": f"{root}/config"}


def begin(root: Path, server: Server) -> World:
    """Texts, recipes, tables, a site and a cluster's commands."""
    world = World(root, server)
    (root / "bin").mkdir(parents=True)
    for name, body in COMMANDS.items():
        (root / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (root / "bin" / name).chmod(0o755)
    rng = random.Random(0)
    words = ["router", "expert", "token", "gradient", "tensor", "pipeline", "batch", "loss"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(20)]
    (root / "text.jsonl").write_text("\n".join(lines) + "\n")
    chats = [json.dumps({"prompt": " ".join(rng.choices(words, k=9)), "completion": "expert"}) for _ in range(9)]
    (root / "chats.jsonl").write_text("\n".join(chats) + "\n")
    _write_recipe(root / "recipe.yaml")
    _write_recipe(root / "launched.yaml", run_dir="launched")
    _write_recipe(
        root / "large.yaml",
        run_dir="large",
        model=MODEL | {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
                       "intermediate_size": 512, "moe_intermediate_size": 128},
        training__train_tokens=10_000_000_000, training__global_batch_size=64,
    )  # fmt: skip
    (root / "site.toml").write_text(SITE)
    (root / "gpu.yaml").write_text(GPU)
    (root / "network.yaml").write_text(NETWORK)
    synthetic(root / "all.csv")
    _thin(root / "all.csv", root / "runs.csv")
    return world


def _thin(source: Path, target: Path) -> None:
    """Every third row: enough for a fit, quicker."""
    header, *rows = source.read_text().splitlines()
    target.write_text("\n".join([header, *rows[::4]]) + "\n")
    source.unlink()


def add_data(world: World) -> None:
    world.run(
        "data", "prepare", "--input", "text.jsonl", "--output", "data/corpus",
        "--train-tokenizer", "--vocab-size", "300", "--workers", "1",
    )  # fmt: skip


def add_run(world: World) -> None:
    """A whole run; `stopped/` is the same, stopped after four of its six steps."""
    root = world.root
    world.run("train", "recipe.yaml")
    _write_recipe(root / "stopped.yaml", run_dir="stopped")
    shutil.copytree(root / "run", root / "stopped")
    shutil.rmtree(root / "stopped" / "checkpoints" / f"step_{STEPS:08d}")
    records = (root / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in records if json.loads(line)["step"] <= STEPS - SAVED_EVERY]
    (root / "stopped" / "metrics.jsonl").write_text("".join(kept))


def add_exports(world: World) -> None:
    world.run("convert", "to-hf", "run", "hf", "--max-shard-size", "20KB")
    world.run("convert", "from-hf", "hf", "ckpt")


def add_scaling(world: World) -> None:
    world.run("scaling", "fit", "runs.csv", "--output", "fit", "--samples", "4")
    world.run("scaling", "ladder", "large.yaml", "--flops-budget", "1e15", "--output", "ladder")


def add_launched(world: World) -> None:
    """A run as `launch` and its job leave it, without the job."""
    world.run("launch", "launched.yaml", "--site", "site.toml", "--nproc", "1")
    launch = world.root / "launched" / "launch"
    attempt = launch / "attempts" / "001"
    for name in ("nodes", "errors", "failures", "ranks"):
        (attempt / name).mkdir(parents=True)
    decision = {
        "action": "requeue", "kind": "killed", "reason": "rank 0 on n1: killed by SIGKILL", "host": "n1", "nodes": {},
        "job": "4711", "restarts": 0, "placed": ["n1"], "started": 2e9, "ended": 2e9 + 60, "evidence": {},
    }  # fmt: skip
    records = {
        "decision.json": decision,
        "plan.json": {"attempt": 1, "time": 2e9, "nodes": ["n1"], "saved_step": 0},
        "nodes/n1.json": {"host": "n1", "ranks": {"0": {"pid": 1, "step": 3}}},
    }
    for name, value in records.items():
        (attempt / name).write_text(json.dumps(value))
    (attempt / "ranks" / "rank-0000.log").write_text("2026-11-26T10:00:00.000 step 1\n2026-11-26T10:00:01.000 step 2\n")
    (launch / "excluded_nodes.json").write_text(json.dumps({"n2": "failed twice"}))
    _write_metrics(world.root / "launched")
    (world.root / "launched" / "checkpoints").mkdir(exist_ok=True)


def _write_metrics(run: Path) -> None:
    run.mkdir(exist_ok=True)
    lines = [
        {
            "step": step, "time": 2e9 + step, "tokens": step * TOKENS_PER_STEP, "loss": 6 - step / 10, "grad_norm": 1.0,
            "learning_rate": 0.01, "memory_bytes": 5e8, "step_seconds": 0.1, "tokens_per_second": 320.0,
            "model_flops_per_second": 2e7, "share_of_peak": 0.01,
        }
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def add_weights(world: World) -> None:
    """A Hugging Face directory of a model that was never trained, and a checkpoint made of it."""
    import qwen_moe
    from qwen_moe.config import ModelConfig
    from qwen_moe.models.init import build_model

    qwen_moe.save_pretrained(build_model(ModelConfig(**MODEL), seed=0), world.root / "hf", max_shard_size="20KB")
    world.run("convert", "from-hf", "hf", "ckpt")


def add_dense(world: World) -> None:
    """A Hugging Face directory of a dense model that was never trained."""
    import qwen_moe
    from qwen_moe.models.init import build_model
    from tests.small import small_model

    qwen_moe.save_pretrained(build_model(small_model("qwen2"), seed=0), world.root / "dense")


def add_ladder_runs(world: World) -> None:
    """Two small runs of the ladder as finished ones: their recipes and curves."""
    for name in sorted(path.stem for path in (world.root / "ladder").glob("run_*.yaml"))[:2]:
        recipe = yaml.safe_load((world.root / "ladder" / f"{name}.yaml").read_text())
        run = world.root / recipe["run_dir"]
        run.mkdir(parents=True)
        shutil.copy(world.root / "ladder" / f"{name}.yaml", run / "config.yaml")
        steps = -(-recipe["training"]["train_tokens"] // (16 * recipe["training"]["global_batch_size"]))
        lines = [json.dumps({"step": step, "loss": 5 - step / (2 * steps)}) for step in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def build_light(root: Path, server: Server) -> World:
    """What needs no training and no fit: the run folders are written by hand."""
    world = begin(root, server)
    _write_metrics(root / "run")
    add_weights(world)
    add_dense(world)
    add_launched(world)
    return world


def build(root: Path, server: Server) -> World:
    """Everything."""
    world = begin(root, server)
    for part in (add_data, add_run, add_exports, add_dense, add_scaling, add_ladder_runs, add_launched):
        part(world)
    return world
