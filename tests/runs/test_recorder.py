"""Recorders that fail do not end training, and lose nothing that can be kept; Weights & Biases goes on with its run."""

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qwen_moe.config import LoggingConfig, WandbConfig
from qwen_moe.runs import recorder as metrics
from qwen_moe.runs.recorder import Recorder
from qwen_moe.runs.records import read_lines
from qwen_moe.runs.sinks import open_sinks
from tests.runs.test_report import record
from tests.training.test_step import make_config


class Full(io.FileIO):
    """A disk that takes part of a line and then no more, while `full`."""

    full = False

    def write(self, data: Any) -> int:
        if self.full:
            super().write(bytes(data[:7]))
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


class Failing:
    name = "a recorder"
    calls = 0

    def write(self, record: dict[str, Any]) -> None:
        self.calls += 1
        raise ConnectionError("no route")

    def go_back(self, step: int) -> None: ...

    def close(self) -> None: ...


def test_what_fails_is_said_once_and_metrics_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(metrics.io, "FileIO", Full)
    sink = Failing()
    recorder = Recorder(tmp_path, resumed_step=0, train_steps=9, sinks=[sink])
    recorder.step(record(1))
    monkeypatch.setattr(Full, "full", True)
    for step in (2, 3):
        recorder.step(record(step))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    recorder.go_back(2, {"step": 2, "skipped_batches": 1}, "went back")
    monkeypatch.setattr(Full, "full", False)
    recorder.step(record(3))
    recorder.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (2, False), (3, True)]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written") == 1
    assert said.count("a recorder gets no more records") == 1 and "no route" in said and sink.calls == 1


def test_a_resumed_run_goes_on_with_its_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'qwen-moe[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logging = LoggingConfig(tensorboard=False, wandb=WandbConfig(project="p"))
    config = make_config().model_copy(update={"run_dir": tmp_path / "run", "logging": logging})
    for step in (0, 1):
        sinks, warnings = open_sinks(config, resumed_step=step)
        assert not warnings and len(sinks) == 1
        sinks[0].write(record(step + 1))
        sinks[0].close()
    identity = json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    runs = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all((run / f"run-{identity}.wandb").stat().st_size > 0 for run in runs)


def test_the_first_step_shows_no_speed_that_is_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    recorder = Recorder(tmp_path, resumed_step=3, train_steps=9)
    recorder.begin("first step")
    recorder.bar.mininterval = 0  # draw every change
    recorder.step(record(4))
    recorder.first_step_done()
    recorder.bar.refresh()
    assert recorder.bar.n == recorder.bar.initial == 4
    recorder.step(record(5))
    recorder.close()
    shown = capsys.readouterr().err
    assert "5/9" in shown and "<-" not in shown and ", -" not in shown
