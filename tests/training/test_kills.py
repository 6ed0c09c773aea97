"""Ten kills at random moments through fine-tuning, DPO, a reward model and GRPO: each run ends in the same bits."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.runs.records import read_lines
from tests.posttraining.walks import MODEL
from tests.training.commands import command, run_to_end
from tests.training.test_post_training import dpo, pairs, recipe, trained, tuned

__all__ = ["pairs", "tuned"]  # fixtures

KILLS = {"sft": 2, "dpo": 3, "reward_model": 2, "grpo": 3}


def written(kind: str, tuned: Path, pairs: Path, name: str) -> Path:
    often = {"checkpoint": {"load_from": str(tuned / "sft" / "hf"), "interval": 2, "export_hf": False}}
    data = {"train": [{"prefix": str(tuned / "sft-data")}], "tokenizer": str(tuned / "sft-data-tokenizer")}
    if kind == "sft":
        return recipe(tuned, name, kind, data=data, training={"epochs": 3}, **often)
    if kind != "grpo":
        return dpo(tuned, pairs, name, objective=kind, training={"epochs": 3, "validation_interval": 0}, **often)
    rollout = {
        "queries": ["tasks:addition:60"],
        "rewards": ["format:1"],
        "episodes": 8,
        "queries_per_episode": 8,
        "updates_per_episode": 2,
        "samples": 4,
        "max_new_tokens": 6,
    }
    sampled: dict[str, Any] = {
        "data": {"sequence_length": 128, "tokenizer": str(tuned / "sft" / "hf")},
        "training": {"global_batch_size": 16, "micro_batch_size": 1, "epochs": 0, "validation_interval": 0},
    }
    return recipe(tuned, name, kind, rollout=rollout, model=MODEL, **sampled, **often)


def losses(metrics: Path) -> list[float]:
    """Of each recorded step."""
    return [line["loss"] for line in read_lines(metrics) if "loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KILLS)
def test_kills_at_random_moments_change_nothing(kind: str, tuned: Path, pairs: Path) -> None:
    expected = [line["loss"] for line in trained(written(kind, tuned, pairs, f"{kind}-whole"))]
    path, rng = written(kind, tuned, pairs, f"{kind}-killed"), random.Random(kind)
    metrics = tuned / f"{kind}-killed" / "metrics.jsonl"
    for kill in range(KILLS[kind]):
        process = subprocess.Popen(command(path), start_new_session=True, stderr=subprocess.DEVNULL)
        # Preparing, computing the reference, sampling or training; however fast, not after this kill's share of the steps.
        end, most = time.monotonic() + rng.uniform(2, 14), len(expected) * (kill + 1) // (KILLS[kind] + 1)
        while process.poll() is None and time.monotonic() < end and len(losses(metrics)) < most:
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it was killed often enough"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run_to_end(path).returncode == 0
    assert losses(metrics) == expected
