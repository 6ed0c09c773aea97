"""`qwen-moe pipeline --slurm`: submits what is neither done nor in the queue, and ends in order while runs are waited for.

Slurm itself is replaced: `launch --array` by what it leaves behind, and the queue by a list. The array on a real Slurm is
tested in `tests/launchers/job`.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import RunFolder, read_json
from launchers.slurm import commands
from qwen_moe.cli import main
from qwen_moe.config import dump_config, load_config
from qwen_moe.launch import array
from qwen_moe.launch.folder import Entry, open_folder
from qwen_moe.launch.prepare import absolute
from qwen_moe.workflow import steps
from tests.workflow import fake_train
from tests.workflow.test_workflow import BUDGET, write_recipe

LADDER = Path("out", "ladder")


class Slurm:
    """A queue, and `launch --array`, which puts every run into it that is not in it and not complete."""

    def __init__(self) -> None:
        self.jobs: list[commands.Job] = []
        self.arrays: list[list[str]] = []
        self.options: list[argparse.Namespace] = []

    def queue(self) -> list[commands.Job]:
        return list(self.jobs)

    def launch(self, args: argparse.Namespace, site: object) -> int:
        assert args.recipe == LADDER
        self.options.append(args)
        known = {job.job_id for job in self.jobs}
        chosen: list[str] = []
        for entry in open_folder(LADDER, []):
            facts = read_json(RunFolder(entry.config.run_dir).facts_file) or {"job": ""}
            if facts["job"] in known or (entry.config.run_dir / "checkpoints").exists():
                continue
            job = f"{len(self.arrays) + 1}_{len(chosen)}"
            write_json(RunFolder(entry.config.run_dir).facts_file, {"job": job})
            self.jobs.append(job_of(job))
            chosen.append(entry.name)
        self.arrays.append(chosen)
        return 0


def job_of(job_id: str) -> commands.Job:
    return commands.Job(job_id=job_id, name="ladder", state="PENDING", reason="", elapsed="", left="", nodes="")


def pipeline(*options: str) -> int:
    return main(["pipeline", "recipe.yaml", "--output", "out", "--flops-budget", BUDGET, "--slurm", *options])


def end(entry: Entry, slurm: Slurm, *, trained: bool) -> None:
    """The job of a run leaves the queue; the run is complete if it was ``trained``."""
    job = read_json(RunFolder(entry.config.run_dir).facts_file)["job"]
    slurm.jobs = [other for other in slurm.jobs if other.job_id != job]
    if trained:
        fake_train.main(entry.path, [])


def test_the_same_command_submits_waits_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = Slurm()
    monkeypatch.setattr(commands, "queue", slurm.queue)
    monkeypatch.setattr(array, "launch_array", slurm.launch)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    assert pipeline("--yes", "--parallel", "7") == 0
    said = capsys.readouterr()
    entries = open_folder(LADDER, [])
    assert f"{len(entries)} of {len(entries)} small runs are in the queue" in said.err
    assert "error" not in said.err and "pipeline.md" not in said.out
    assert slurm.arrays == [[entry.name for entry in entries]] and slurm.options[0].max_parallel == 7

    # While they are in the queue nothing is asked (there is no terminal) or submitted.
    for entry in entries[:5]:
        end(entry, slurm, trained=True)
    assert pipeline() == 0
    said = capsys.readouterr()
    assert f"{len(entries) - 5} of {len(entries)} small runs are in the queue" in said.err
    assert "have to be trained" not in said.err and len(slurm.arrays) == 1

    # Runs that left the queue without being complete are submitted again, and they alone.
    for entry in entries[5:]:
        end(entry, slurm, trained=entry not in entries[-2:])
    assert pipeline() == 2
    assert f"2 of {len(entries)} runs have to be trained" in capsys.readouterr().err
    assert pipeline("--yes") == 0
    assert slurm.arrays[1:] == [[entry.name for entry in entries[-2:]]]

    for entry in entries[-2:]:
        end(entry, slurm, trained=True)
    assert pipeline("--until", "collect") == 0
    assert list(read_json(tmp_path / "out" / "state.json")["steps"]) == ["prepare", "ladder", "run", "collect"]
    assert len(slurm.arrays) == 2


def test_the_job_that_a_killed_call_submitted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the queue, and not yet recorded: the same command neither asks nor submits again."""
    queue: list[commands.Job] = []
    monkeypatch.setattr(commands, "queue", lambda: queue)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)  # under the name of the final recipe
    at: Any = SimpleNamespace(folder=tmp_path, args=SimpleNamespace(gpus=2, submit=True))
    config = absolute(load_config(tmp_path / steps.RECIPE))
    run = RunFolder(config.run_dir)
    assert steps._job_in_queue(at) == ""
    write_json(run.facts_file, {"job": "5"})
    write_text(run.launch / "recipe.yaml", dump_config(config))
    assert steps._job_in_queue(at) == "", "it has left the queue"
    queue.append(job_of("5"))
    assert steps._job_in_queue(at) == "5" and steps._launch_cost(at) == []
    assert steps._launch(at) == {"text": "job 5 was in the queue already", "submitted": True}
    write_text(run.launch / "recipe.yaml", dump_config(config.model_copy(update={"seed": 77})))
    assert steps._job_in_queue(at) == "", "another recipe is in the queue"
