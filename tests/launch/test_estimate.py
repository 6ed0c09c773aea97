"""What a job of a run of stages is expected to take: the work of all its stages, not of the first."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.job.status import steps_to_do
from launchers.slurm.site import Hardware
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.launch.estimate import estimate
from qwen_moe.models.flops import flops_per_token
from tests.small import changed, model_values

TWO = [
    {"name": "short", "tokens": 640},
    {"name": "long", "tokens": 1024, "data": {"sequence_length": 256}, "training": {"global_batch_size": 2}},
]
SPEC: Any = SimpleNamespace(nodes=1, gpus_per_node=2, time="")


def config(run_dir: Path, **changes: Any) -> RunConfig:
    values = {
        "run_dir": str(run_dir),
        "model": model_values(),
        "data": {"train": [{"prefix": "a"}], "sequence_length": 16},
        "training": {"micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"export_hf": False},
    }
    return parse_config(changed(values, changes), "test")


def test_the_time_of_all_stages(tmp_path: Path) -> None:
    staged = config(tmp_path, stages=TWO)
    short, long = (flops_per_token(staged.model, length).training for length in (16, 256))
    hardware = Hardware(peak_tflops=1e-3, expected_utilisation=0.5)
    found = estimate(staged, SPEC, hardware, tmp_path)
    assert found.remaining_steps == 12
    assert found.seconds == pytest.approx((640 * short + 1024 * long) / 1e9)
    shares = [640 * short, 1024 * long]
    assert [(name, steps) for name, steps, _ in found.stages] == [("short", 10), ("long", 2)]
    assert [share for *_, share in found.stages] == pytest.approx([share / sum(shares) for share in shares])
    text = "\n".join(found.lines())
    assert "stage short: 10 steps" in text and "stage long: 2 steps" in text
    # Measured in the first stage, whose tokens cost less.
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 5, "loss": 3.0, "tokens_per_second": 100.0}) + "\n")
    measured = estimate(staged, SPEC, hardware, tmp_path)
    assert measured.seconds == pytest.approx((640 * short + 1024 * long) / (100 * short))
    plain = estimate(config(tmp_path, training__train_tokens=640), SPEC, hardware, tmp_path)
    assert plain.stages == () and plain.seconds == pytest.approx(6.4)


def test_steps_left_count_by_their_work() -> None:
    stages = [{"end_step": 10, "flops_per_step": 2.0}, {"end_step": 14, "flops_per_step": 6.0}]
    assert steps_to_do(stages, 4, 14) == 6 + 4 * 3
    assert steps_to_do(stages, 12, 14) == 2
    assert steps_to_do(stages, 14, 14) == 0
    for none in (None, [], "x", [3], [{"end_step": 10}], [{"end_step": 9, "flops_per_step": 0}]):
        assert steps_to_do(none, 4, 14) == 10
