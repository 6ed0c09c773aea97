"""What is said of a step that takes long, and that a first step does not spoil the figures after it."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from qwen_moe.config import RunConfig
from qwen_moe.runs.recorder import Recorder
from qwen_moe.training import slow_step
from qwen_moe.training.loop import _Clock
from qwen_moe.training.slow_step import SlowStepNotice, slow_step_reason
from tests.training.test_step import make_config


@pytest.fixture
def config() -> RunConfig:
    return make_config()


def test_the_reason_is_compilation_or_arithmetic_and_a_busy_machine_is_named() -> None:
    compiles = slow_step_reason(1, 1e13, 1e11, True, 0.5, 2, 60)
    assert "step 1 has taken more than 60 s: it compiles" in compiles and "load" not in compiles
    computes = slow_step_reason(7, 2e13, 1e11, False, 8.0, 2, 60)
    assert "20,000 GFLOP, at least 200 s" in computes and "load 8.0 on 2 cores" in computes


def test_a_slow_step_is_spoken_of_once_and_a_quick_one_never(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_step, "PATIENCE", 0.3)
    said: list[str] = []
    notice = SlowStepNotice(said.append, config, 1e11)
    for step in range(1, 4):
        notice.begin_step(step, False)
        time.sleep(0.05)
        notice.end_step()
    time.sleep(0.5)
    assert said == []
    notice.begin_step(4, False)
    time.sleep(1.0)
    notice.begin_step(5, False)
    time.sleep(0.6)
    notice.close()
    assert len(said) == 1 and said[0].startswith("step 4 has taken")


@pytest.fixture
def alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_first_step_is_left_out_of_speed_and_time_left(config: RunConfig, alone: None, tmp_path: Path) -> None:
    clock = _Clock(config, 1e12)
    tokens = config.tokens_per_step
    assert clock.record(100.0)["tokens_per_second"] == pytest.approx(tokens / 100)
    assert clock.record(2.0)["tokens_per_second"] == pytest.approx(tokens / 2)
    assert clock.record(4.0)["tokens_per_second"] == pytest.approx(tokens / 2.2)
    recorder = Recorder(tmp_path, resumed_step=5, train_steps=25)
    now = [0.0]
    recorder.bar._time = lambda: now[0]  # tqdm's clock
    recorder.bar.start_t = recorder.bar.last_print_t = 0.0
    recorder.begin("compiling")
    now[0] = 600.0
    recorder.step({"step": 6, "loss": 1.0, "tokens_per_second": 1.0})
    recorder.first_step_done()
    for step in range(7, 10):
        now[0] += 2.0
        recorder.step({"step": step, "loss": 1.0, "tokens_per_second": 1.0})
    shown = recorder.bar.format_dict
    assert shown["n"] == 9 and shown["initial"] == 6
    assert shown["elapsed"] == pytest.approx(6.0)
    recorder.close()
