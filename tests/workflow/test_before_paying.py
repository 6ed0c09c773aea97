"""What `qwen-moe pipeline` refuses or says before it spends anything, and what it says that the small runs will cost."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from launchers.folder.atomic import write_json
from launchers.folder.run_folder import read_json
from launchers.slurm import commands
from qwen_moe.cli import main
from qwen_moe.launch import folder as launch_folder
from qwen_moe.launch.folder import Entry, open_folder
from qwen_moe.models.flops import training_flops
from qwen_moe.workflow.cost import ladder_cost
from tests.workflow import fake_train
from tests.workflow.test_workflow import BUDGET, FAKE, write_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_folder, "TRAIN", FAKE)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)


def pipeline(*options: str) -> int:
    return main(["pipeline", "recipe.yaml", "--output", "out", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --flops-budget: the FLOPs of all small runs together"),
        (("--flops-budget", BUDGET, "--gpus", "16", "--gpu", "h100-800gb"), "did you mean"),
        (("--flops-budget", BUDGET, "--gpus", "16", "--network", "ib4000"), "ib4000"),
        (
            ("--flops-budget", BUDGET, "--gpus", "16", "--gpu", "a100-80gb", "precision.compute=fp8"),
            "does not compute in fp8",
        ),
        (("--flops-budget", BUDGET, "--gpus", "16", "model.moe_intermediate_size=36"), "36 is not a multiple of 8"),
        (("--flops-budget", BUDGET, "--gpus", "16", "--site", "none.toml"), "none.toml"),
        (("--flops-budget", BUDGET, "--slurm", "--site", "none.toml"), "none.toml"),
        (("--flops-budget", BUDGET, "--slurm"), "there is no Slurm here"),
        (("--flops-budget", BUDGET, "--gpus", "16", "--submit"), "there is no Slurm here"),
        (("--flops-budget", BUDGET, "--slurm", "--threads", "2"), "set launch.threads in the recipe"),
    ],
)
def test_what_would_fail_later_is_refused_first(
    recipe: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, whatever this machine has
    assert pipeline(*options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "state.json").exists() and not (tmp_path / "tokens.bin").exists()


def test_a_run_of_which_small_ones_tell_nothing_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline", "dpo_demo", "--flops-budget", BUDGET, "--output", str(tmp_path / "out")]) == 2
    assert "objective.kind dpo are nats per pair" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_step_that_is_not_gone_through_needs_nothing(recipe: None, tmp_path: Path) -> None:
    assert pipeline("--until", "prepare") == 0 and (tmp_path / "tokens.bin").is_file()


def test_the_budget_need_not_be_given_again(recipe: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline("--flops-budget", BUDGET, "--until", "ladder") == 0
    state = read_json(tmp_path / "out" / "state.json")
    capsys.readouterr()
    assert pipeline("--until", "ladder") == 0
    assert "[2/8] ladder: done before" in capsys.readouterr().err
    assert read_json(tmp_path / "out" / "state.json") == state


def test_a_large_run_that_is_too_far_from_the_small_ones_is_told_before_they_are_paid_for(
    recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    far = "training.train_tokens=500_000_000"
    with open("/dev/null") as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert pipeline(far, "--flops-budget", BUDGET) == 2
        said = capsys.readouterr().err
        assert "tokens is " in said and "times outside the runs (limit 30)" in said
        assert "will need --accept-extrapolation" in said
        assert "tokens is " in (tmp_path / "out" / "pipeline.md").read_text()
        assert pipeline(far, "--flops-budget", BUDGET, "--accept-extrapolation") == 2
        assert "times outside" not in capsys.readouterr().err
        shutil.rmtree("out")
        assert pipeline("--flops-budget", BUDGET) == 2
        assert "times outside" not in capsys.readouterr().err
    arguments = ["recipe.yaml", far, "--flops-budget", BUDGET, "--output", "ladder"]
    assert main(["scaling", "ladder", *arguments]) == 0
    assert "`scaling recommend` will need --accept-extrapolation" in capsys.readouterr().out


def finish(entry: Entry, share: float = 1.0, loss: float | None = None) -> None:
    """Leave the folder of a run whose first steps, as ``share`` says, are done and saved."""
    fake_train.main(entry.path, [])
    run, step = entry.config.run_dir, round(share * entry.config.train_steps)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= {"step": step} | ({} if loss is None else {"loss": loss})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(run / "checkpoints")
    write_json(run / "checkpoints" / f"step_{step:08d}" / "manifest.json", {})


def test_the_cost_counts_what_is_left(recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a branch takes from its trunk, what was trained before a stop, or what diverged and is not run again."""
    assert pipeline("--flops-budget", BUDGET, "--until", "ladder") == 0
    ladder = tmp_path / "out" / "ladder"
    monkeypatch.setattr(commands, "queue", list)
    entries = open_folder(ladder, [])
    branches = [entry for entry in entries if entry.after]
    assert branches and len(branches) < len(entries)

    def left() -> tuple[int, float]:
        words = ladder_cost(ladder, 1, slurm=True)[0].split()
        return int(words[0]), float(words[8])

    own = sum(training_flops(e.config, launch_folder.first_step(e.config)) for e in entries)
    assert left() == (len(entries), pytest.approx(own, rel=5e-3))
    assert own < 0.95 * sum(training_flops(entry.config) for entry in entries)
    trunk = max((e for e in entries if not e.after), key=lambda e: training_flops(e.config))
    finish(trunk, 0.5)
    own -= training_flops(trunk.config) - training_flops(trunk.config, round(0.5 * trunk.config.train_steps))
    assert left() == (len(entries), pytest.approx(own, rel=5e-3))
    for entry in entries:
        finish(entry, loss=99.0 if entry is branches[0] else None)
    (branches[0].config.run_dir / "checkpoints").rename(tmp_path / "lost")
    assert ladder_cost(ladder, 1, slurm=False) == []
    # With nothing left to pay for, nobody is asked.
    assert pipeline("--until", "run") == 0


def test_the_progress_of_a_branch_is_that_of_its_own_steps(recipe: None, tmp_path: Path) -> None:
    assert pipeline("--flops-budget", BUDGET, "--until", "ladder") == 0
    entry = next(entry for entry in open_folder(tmp_path / "out" / "ladder", []) if entry.after)
    task = launch_folder._task(entry, tmp_path, 0, [])
    first, last = launch_folder.first_step(entry.config), entry.config.train_steps
    assert 0 < first < last and task.progress() == (0.0, "")
    assert task.work == pytest.approx(training_flops(entry.config) * (last - first) / last)
    for step in (first, (first + last) // 2, last):
        finish(entry, step / last)
        assert task.progress()[0] == pytest.approx((step - first) / (last - first))
