"""Recipes of a folder whose length only their data tell: which are complete, what has changed, what is expected."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.folder.run_folder import RunFolder
from launchers.slurm.script import JobSpec
from launchers.slurm.site import Hardware
from qwen_moe.config import load_config
from qwen_moe.launch.estimate import estimate
from qwen_moe.launch.folder import Entry, is_complete, open_folder
from qwen_moe.runs.outcome import changed_settings, difference, with_known_length
from qwen_moe.runs.records import RESOLVED
from tests.posttraining.walks import MODEL


def entry(tmp_path: Path, **training: Any) -> Entry:
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": MODEL,
        "objective": {"kind": "sft"},
        "data": {"sequence_length": 64, "tokenizer": "t", "train": [{"prefix": "p"}]},
        "training": {"micro_batch_size": 1, "global_batch_size": 2, "epochs": 3} | training,
        "optimizer": {"learning_rate": 0.01},
    }
    folder = tmp_path / "recipes"
    folder.mkdir(exist_ok=True)
    (folder / "sft.yaml").write_text(yaml.safe_dump(values))
    (found,) = open_folder(folder, [])
    return found


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> Entry:
    """A run of 3 epochs, which its data made 5 steps, of which ``step`` are saved."""
    found = entry(tmp_path)
    values = found.config.model_dump(mode="json")
    values["training"]["train_tokens"] = 5 * 2 * 64
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RESOLVED).write_text(yaml.safe_dump(values))
    monkeypatch.setattr(RunFolder, "saved_step", lambda self: step)
    return found


def test_a_run_of_epochs_that_never_began_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(entry(tmp_path))


@pytest.mark.parametrize(("step", "complete"), [(0, False), (4, False), (5, True)])
def test_a_run_of_epochs_is_complete_after_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, complete: bool
) -> None:
    found = begun(tmp_path, monkeypatch, step)
    assert is_complete(found) == complete
    assert difference(found.config, tmp_path / "run") == ""
    assert with_known_length(found.config, tmp_path / "run").train_steps == 5
    assert load_config(tmp_path / "run" / RESOLVED).train_steps == 5


def test_other_epochs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, monkeypatch, 5)
    longer = entry(tmp_path, epochs=4)
    assert not is_complete(longer), "the run decides whether its length may change"
    assert [str(one) for one in changed_settings(longer.config, tmp_path / "run")] == [
        "training.epochs was 3, is now 4",
    ]


def test_what_is_expected_of_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = JobSpec(
        name="job",
        folder=tmp_path,
        workdir=tmp_path,
        python="python",
        code_root=tmp_path,
        nodes=1,
        processes_per_node=1,
    )
    hardware = Hardware(peak_tflops=100)
    found = estimate(entry(tmp_path).config, spec, hardware, tmp_path / "run")
    assert found.seconds is None and found.lines()[0] == "steps to do       unknown"
    assert "known when the data have been read" in found.lines()[1]
    config = begun(tmp_path, monkeypatch, 2).config
    assert estimate(config, spec, hardware, tmp_path / "run").remaining_steps == 3
