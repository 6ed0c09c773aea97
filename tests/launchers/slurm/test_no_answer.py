"""A cluster whose controller is away: what `status`, `cancel` and `launch` say, and how soon. Stand-ins for its commands."""

import json
import time
from pathlib import Path

import pytest

from launchers.errors import LaunchError
from launchers.folder.atomic import write_json
from launchers.folder.run_folder import RunFolder
from launchers.job import status
from launchers.slurm import commands as slurm

DOWN = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
WHY = "Slurm does not answer (squeue: Unable to contact slurm controller (connect failure))"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launched run with job 7 in the queue; stand-ins come first on PATH."""
    folder = tmp_path / "run"
    write_json(RunFolder(folder).facts_file, {"job": "7", "train_steps": 10, "tokens_per_step": 8, "launched": 0.0})
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.3)
    stand_in(tmp_path, "squeue", "echo '7|RUNNING|1:00|1:00|n1|None|run'")
    return folder


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_status_tells_no_answer_from_no_slurm(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_moe.cli import main

    stand_in(tmp_path, "squeue", DOWN)
    assert main(["status", str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["last"]) == ("unknown", WHY)
    assert main(["status", str(run)]) == 0
    assert WHY in capsys.readouterr().err


def test_without_its_commands_there_is_no_slurm(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status.row(run, *status.ask_queue())["last"] == "Slurm is not installed here"


def test_a_controller_that_is_silent_is_not_waited_for(run: Path, tmp_path: Path) -> None:
    stand_in(tmp_path, "squeue", "sleep 20; exit 0")  # the shell's child holds the pipes
    start = time.monotonic()
    jobs, why = status.ask_queue()
    assert jobs is None and why == "Slurm does not answer (squeue gave no answer within 0.3 s)"
    with pytest.raises(LaunchError, match=r"Slurm does not answer .*scontrol ping"):
        status.cancel(run)
    assert time.monotonic() - start < 5


def test_a_job_of_which_scontrol_cannot_be_asked_is_not_gone(run: Path, tmp_path: Path) -> None:
    stand_in(tmp_path, "squeue", "exit 0")
    stand_in(tmp_path, "scontrol", DOWN)
    found = status.row(run, *status.ask_queue())
    assert found["state"] == "unknown" and found["last"].startswith("Slurm does not answer (scontrol: Unable")


@pytest.mark.parametrize("script", [DOWN, "sleep 20; exit 0"])
def test_a_cancel_that_did_not_reach_slurm_leaves_no_mark(script: str, run: Path, tmp_path: Path) -> None:
    stand_in(tmp_path, "scancel", script)
    with pytest.raises(slurm.NoAnswer):
        status.cancel(run)
    assert not (run / "launch/cancelled.json").exists()
    stand_in(tmp_path, "scancel", "exit 0")
    assert "job 7 cancelled" in status.cancel(run) and (run / "launch/cancelled.json").exists()


def test_other_errors_of_slurm_are_its_own_words(run: Path, tmp_path: Path) -> None:
    stand_in(tmp_path, "squeue", "echo 'squeue: error: Invalid user: me' >&2; exit 1")
    assert status.ask_queue() == (None, "squeue: error: Invalid user: me")


def test_commands_without_a_cluster_say_what_to_do(run: Path, tmp_path: Path) -> None:
    said = "sinfo: error: fetch_config: DNS SRV lookup failed\nsinfo: fatal: Could not establish a configuration source"
    stand_in(tmp_path, "sinfo", f"echo '{said}' >&2; exit 1")
    with pytest.raises(slurm.SlurmError) as error:
        slurm.run("sinfo")
    assert str(error.value) == (
        "sinfo is installed here, but finds no configuration of a cluster (Could not establish a configuration source): "
        "run this on a login node of the cluster, set SLURM_CONF, or use `qwen-moe launch --local`"
    )
