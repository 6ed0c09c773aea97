"""`qwen-moe post-train` from end to end: what each step works on, going on after kills, inputs that change, the page."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.folder.run_folder import read_json
from qwen_moe.cli import main
from qwen_moe.posttraining import steps as steps_module
from qwen_moe.runs.records import read_lines
from qwen_moe.workflow.state import Stopped
from tests.posttraining.walks import write_recipe

STEPS = [
    *("sft", "measure sft", "rollout", "pairs", "dpo", "measure dpo", "reward_model", "grpo", "measure grpo"),
]


pytestmark = pytest.mark.slow  # the walk that all tests look at takes a minute


def post_train(*options: str) -> int:
    return main(["post-train", "recipe.yaml", *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder where the walk went through, and what it printed."""
    folder, out = tmp_path_factory.mktemp("whole"), io.StringIO()
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        assert post_train("--json") == 0
    return folder, json.loads(out.getvalue())


@pytest.fixture
def finished(whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a folder where the walk went through, where commands now run; none of them starts a process."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps_module, "run_command", no_process)
    return tmp_path


def no_process(arguments: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int]) -> str:
    raise AssertionError(f"qwen-moe {' '.join(arguments)} was called")


def stops(arguments: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int]) -> str:
    raise Stopped(7)


def done(folder: Path) -> list[str]:
    return list(read_json(folder / "run" / "state.json")["steps"])


def recipe_of(folder: Path, step: str) -> dict[str, Any]:
    return yaml.safe_load((folder / "run" / f"{step}.yaml").read_text())


def test_every_step_works_on_what_the_one_before_made(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = whole
    assert done(folder) == [one["step"] for one in facts["steps"]] == STEPS
    assert "load_from" not in recipe_of(folder, "1-sft").get("checkpoint", {})
    dpo, reward, grpo = (recipe_of(folder, step) for step in ("4-dpo", "5-reward_model", "6-grpo"))
    assert dpo["checkpoint"] == {"load_from": "run/1-sft", "interval": 2}
    assert reward["checkpoint"]["load_from"] == "run/1-sft" and grpo["checkpoint"]["load_from"] == "run/4-dpo"
    assert dpo["data"]["train"] == reward["data"]["train"] == [{"prefix": "run/3-pairs/pairs"}]
    assert grpo["rollout"]["reward_model"] == "run/5-reward_model" and grpo["rollout"]["variances"] == "run/2-rollout"
    by_step = {one["step"]: one for one in facts["steps"]}
    # DPO and the reward model learned from as many pairs as were made, and DPO began at its reference.
    pairs = by_step["pairs"]["counts"]["pairs"]
    assert pairs > 3 and by_step["dpo"]["learned_from"] == f"{pairs} pairs, 2 epochs"
    assert by_step["reward_model"]["learned_from"] == by_step["dpo"]["learned_from"]
    assert by_step["dpo"]["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert by_step["grpo"]["steps"] == 3 and len(by_step["grpo"]["reward"]) == 2
    # GRPO's rewards are the verifier's and the reward model's together.
    first = read_lines_of(folder / "run" / "6-grpo" / "episodes" / "episode_000000" / "samples.jsonl")
    assert any(line["reward"] not in (0.0, 1.0) for line in first)


def read_lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewards(folder: Path, model: str) -> list[float]:
    rows = read_lines_of(folder / "run" / "measured" / model / "rollouts-00000.jsonl")
    return [row["samples"][0]["reward"] for row in rows]


def test_the_page_shows_what_each_step_gained(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = whole
    by_step = {one["step"]: one for one in facts["steps"]}
    page = (folder / "run" / "post-training.md").read_text()
    before = None
    for model in ("sft", "dpo", "grpo"):
        found, scores = by_step[f"measure {model}"], rewards(folder, model)
        assert found["queries"] == len(scores) == 30 and len(found["samples"]) == 3
        assert found["score"] == pytest.approx(statistics.fmean(scores), abs=1e-12)
        assert found["error"] == pytest.approx(statistics.stdev(scores) / math.sqrt(30), abs=1e-12)
        assert f"**{found['score']:.1%}** ±" in page
        if before is not None:
            changes = [after - first for first, after in zip(before, scores, strict=True)]
            assert found["gain"] == pytest.approx(statistics.fmean(changes), abs=1e-12)
            assert found["gain_error"] == pytest.approx(statistics.stdev(changes) / math.sqrt(30), abs=1e-12)
            assert f"| {100 * found['gain']:+.1f} ± " in page
        before = scores
    assert "| query | expected | fine-tuned | DPO | GRPO |" in page and "| 0+5= | 5 |" in page
    assert "not done yet" not in page and "](post-training.png)" in page
    assert (folder / "run" / "post-training.png").stat().st_size > 10_000
    commands = [line.split()[1] for line in page.splitlines() if line.startswith("    qwen-moe ")]
    assert commands == ["train", "rollout", "rollout", "data", "train", "rollout", "train", "train", "rollout"]


def test_a_finished_walk_does_nothing_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "run" / "state.json").read_bytes()
    # Where it computes, and what the page shows, is no other walk.
    assert post_train("common.launch.nproc=2", "measure.shown=1") == 0
    assert capsys.readouterr().err.count("done before") == len(STEPS)
    assert (finished / "run" / "state.json").read_bytes() == before


def test_a_step_alone_is_an_ordinary_recipe(finished: Path) -> None:
    """A user can change a step's recipe and train it by itself."""
    command = [sys.executable, "-m", "qwen_moe", "train", "run/4-dpo.yaml", "run_dir=alone", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert losses("alone") == losses("run/4-dpo")


def losses(run: str) -> list[float]:
    return [line["loss"] for line in read_lines(Path(run) / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    ("override", "step", "named"),
    [
        ("sft.optimizer.learning_rate=0.02", "sft", "optimizer.learning_rate was 0.01, is now 0.02"),
        ("rollout.temperature=0.5", "rollout", "rollout.temperature was 1.0, is now 0.5"),
        ("pairs.rule=all", "pairs", "pairs.rule was 'pass-fail', is now 'all'"),
        ("dpo.objective.preference.beta=0.5", "dpo", "objective.preference.beta was 0.1, is now 0.5"),
        ("grpo.rollout.episodes=4", "grpo", "training.train_tokens was 1536, is now 2048"),
        ("dpo=null", "grpo", "the model that grpo begins from has changed"),
    ],
)
def test_changed_settings_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], override: str, step: str, named: str
) -> None:
    before = (finished / "run" / "state.json").read_bytes()
    assert post_train(override) == 2
    message = capsys.readouterr().err
    assert named in message and f"--redo {step}" in message and "Restore them" in message
    assert (finished / "run" / "state.json").read_bytes() == before


def test_changed_inputs_are_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sorted((finished / "run" / "1-sft" / "checkpoints").iterdir())[-1]
    with (newest / "manifest.json").open("ab") as file:
        file.write(b" ")
    assert post_train("measure=null") == 2
    assert "the model that rollout begins from has changed" in capsys.readouterr().err
    monkeypatch.setattr(steps_module, "run_command", stops)
    assert post_train() == 7  # a measurement is cheap, and is done again
    assert "[2/9] measure sft" in (message := capsys.readouterr().err)
    assert "again, because the model sft has changed" in message


def test_other_held_out_queries_are_answered_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps_module, "run_command", stops)
    with (finished / "held.jsonl").open("a") as file:
        file.write('{"prompt": "7+7=", "answer": 14}\n')
    assert post_train() == 7
    message = capsys.readouterr().err
    assert "again, because held.jsonl has changed" in message
    assert "step measure sft failed (exit code 7; the reason is above)" in message
    assert (finished / "run" / "measured" / "sft.old-1").is_dir()


def test_redo_forgets_what_follows_and_nothing_else(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps_module, "run_command", stops)
    assert post_train("--redo", "dpo", "dpo.optimizer.learning_rate=0.001") == 7
    kept = ["sft", "measure sft", "rollout", "pairs", "reward_model"]  # it learned from the pairs, not from DPO
    assert done(finished) == kept
    names = {path.name for path in (finished / "run").iterdir()}
    assert {"4-dpo.old-1", "4-dpo.yaml.old-1", "6-grpo.old-1"} <= names and "6-grpo" not in names
    assert "| DPO | fine-tuned | not done yet |" in (finished / "run" / "post-training.md").read_text()
    assert post_train("--redo", "rollout") == 7
    assert done(finished) == ["sft", "measure sft"]
    assert post_train("--redo", "pairs", "pairs=null", "dpo=null", "reward_model=null", "grpo=null") == 2
    assert "recipe.yaml has no such step; it has sft, rollout" in capsys.readouterr().err


def until(found: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until ``found`` exists."""
    deadline = time.monotonic() + 240
    while not found.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{found} did not appear"
        time.sleep(0.01)


@pytest.mark.timeout(1200)
def test_killed_in_the_middle_of_steps_it_ends_the_same(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    write_recipe(tmp_path)
    command = [sys.executable, "-m", "qwen_moe", "post-train", "recipe.yaml"]
    command += ["--until", "dpo"]
    run = tmp_path / "run"
    for place in (
        run / "1-sft" / "checkpoints" / "step_00000004",
        run / "measured" / "sft" / "manifest.json",
        run / "2-rollout" / "unscored-00000.jsonl",
        run / "4-dpo" / "reference" / "reference.json",
    ):
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        until(place, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert "stopped after dpo, as --until says" in result.stderr
    for name in ("1-sft/hf/model.safetensors", "2-rollout/rollouts-00000.jsonl", "3-pairs/pairs.bin",
                 "4-dpo/hf/model.safetensors", "measured/dpo/rollouts-00000.jsonl"):  # fmt: skip
        assert (run / name).read_bytes() == (whole[0] / "run" / name).read_bytes(), name
    page = (run / "post-training.md").read_text()
    assert "| GRPO | DPO | not done yet |" in page and "attempt" in page
