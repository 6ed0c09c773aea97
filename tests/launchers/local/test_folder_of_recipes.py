"""`qwen-moe launch FOLDER --local` with real runs: a branch after its trunk, kills, interrupts, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qwen_moe.cli import main
from tests.launchers.launched import Launched, write_recipe

STEPS = 60


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "qwen_moe", "launch", str(folder), "--local", *options]


@pytest.fixture
def ladder(tmp_path: Path, corpus: Path) -> Path:
    """A trunk, a branch of it that comes first by name, and a run that cannot start."""
    folder = tmp_path / "ladder"
    folder.mkdir()
    tokens = 8 * 32
    shared = {"optimizer__learning_rate": 0.01, "schedule__kind": "wsd", "schedule__warmup_tokens": 5 * tokens}
    branch = {
        "schedule__decay_tokens": 10 * tokens,
        "data__order_tokens": STEPS * tokens,
        "checkpoint__branch_from": str(folder / "b_trunk" / "checkpoints" / "step_00000020"),
    }
    trunk = {"schedule__decay_tokens": 20 * tokens, "checkpoint__keep_steps": [20]}
    write_recipe(folder, corpus, steps=30, name="a_branch", **shared, **branch)
    write_recipe(folder, corpus, steps=STEPS, name="b_trunk", **shared, **trunk)
    write_recipe(folder, corpus, steps=5, name="c_wrong", model__vocab_size=299)
    return folder


def train_of(launcher: int, recipe: str) -> psutil.Process | None:
    """The `train` process of one recipe."""
    for child in psutil.Process(launcher).children():
        try:
            if any(argument.endswith(recipe) for argument in child.cmdline()):
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def wait_for_steps(process: subprocess.Popen[str], run: Launched, steps: int) -> None:
    end = time.monotonic() + 120
    while run.steps() < steps:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_folder_is_run_through_a_kill_and_an_interrupt(ladder: Path, tmp_path: Path) -> None:
    trunk = Launched(ladder / "b_trunk")
    process = subprocess.Popen(command(ladder, "--parallel", "2"), stderr=subprocess.PIPE, text=True)
    wait_for_steps(process, trunk, 12)
    victim = train_of(process.pid, "b_trunk.yaml")
    assert victim is not None
    victim.kill()
    wait_for_steps(process, trunk, 25)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "b_trunk ended with exit code -9; attempt 2 resumes it" in errors and "same command continues" in errors
    assert not (ladder / "a_branch" / "metrics.jsonl").exists(), "the branch waited for the end of its trunk"
    assert 20 <= trunk.steps() < STEPS

    outcome = subprocess.run(command(ladder), capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 1, outcome.stderr
    assert json.loads(outcome.stdout) == {"complete": 2, "failed": 1}
    assert "c_wrong failed: " in outcome.stderr and "model.vocab_size is 299" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    # As if nothing had happened: what one undisturbed process gives.
    plain = tmp_path / "plain"
    shutil.copy(ladder / "b_trunk.yaml", plain.with_suffix(".yaml"))
    assert main(["train", str(plain.with_suffix(".yaml")), f"run_dir={plain}"]) == 0
    assert trunk.losses() == Launched(plain).losses()
    steps = [step for step, _ in Launched(ladder / "a_branch").losses()]
    assert steps == list(range(21, 31))

    (ladder / "c_wrong.yaml").unlink()
    before = os.stat(ladder / "b_trunk" / "metrics.jsonl").st_mtime_ns
    outcome = subprocess.run(command(ladder), capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0 and json.loads(outcome.stdout) == {"complete": 2}
    assert os.stat(ladder / "b_trunk" / "metrics.jsonl").st_mtime_ns == before


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", *arguments]) == 2
    return capsys.readouterr().err


def test_what_is_refused_says_what_to_do(
    ladder: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = str(ladder)
    assert "add --local" in refused(capsys, here)
    assert "--nproc: not with --local and a folder" in refused(capsys, here, "--local", "--nproc", "2")
    assert "--parallel is for a folder" in refused(capsys, str(ladder / "b_trunk.yaml"), "--local", "--parallel", "2")
    one = [str(ladder / "b_trunk.yaml"), "--local", "--dry-run", "--nproc", "3", "parallel.tp=2"]
    assert "3 processes are not a multiple of tp 2" in refused(capsys, *one)
    assert "--retries: '-1'" in refused(capsys, here, "--local", "--retries", "-1")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "`qwen-moe scaling ladder` writes some" in refused(capsys, str(empty), "--local")
    write_recipe(ladder, corpus, steps=5, name="twin").write_text((ladder / "b_trunk.yaml").read_text())
    assert "have the run_dir" in refused(capsys, here, "--local")
    (ladder / "twin.yaml").unlink()
    assert main(["launch", here, "--local", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert f"a_branch: 30 steps in {ladder / 'a_branch'}, after b_trunk" in shown.out
    assert "3 runs to do, 0 complete" in shown.err and not (ladder / "logs").exists()


def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=3)
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["launch", str(tmp_path), "--local"]) == 0
    assert json.loads(capsys.readouterr().out) == {"complete": 1}
    message = refused(capsys, str(tmp_path), "--local", "optimizer.learning_rate=0.5")
    assert "optimizer.learning_rate was 0.01, is now 0.5" in message and "another run_dir" in message
