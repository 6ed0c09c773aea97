"""The recipe of the passkey demonstration: its first steps run, on packed documents, and its loss falls."""

from pathlib import Path

import pytest

from qwen_moe.runs.records import read_lines
from tests.training.commands import run_to_end

RECIPE = Path(__file__).parents[2] / "recipes" / "passkey_demo.yaml"
SHORT = (
    "data.prepare.input=['passkey:300:1700']",
    "data.prepare.vocab_size=400",
    "data.sequence_length=1024",
    "training.train_tokens=20480",
    "training.global_batch_size=2",
    "training.validation_sequences=2",
    "schedule={kind: constant}",
    "launch.nproc=1",
)


@pytest.mark.timeout(300)
def test_the_first_steps(tmp_path: Path) -> None:
    folders = (f"run_dir={tmp_path / 'run'}", f"data.prepare.output={tmp_path / 'data'}")
    done = run_to_end(RECIPE, *SHORT, *folders)
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
