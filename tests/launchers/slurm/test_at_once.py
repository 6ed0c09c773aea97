"""Launches that begin at once, jobs that launch.json does not know, and logs of runs that end without a word. Stand-ins."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.errors import LaunchError
from launchers.folder import logs
from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import RunFolder
from launchers.job import status
from launchers.job.cluster import scancelled
from launchers.slurm import commands as slurm
from launchers.slurm.commands import Job
from qwen_moe.cli import main
from qwen_moe.errors import UserError
from qwen_moe.launch import prepare
from tests.launchers.launched import write_recipe, write_site

FACTS = {"name": "run-abc", "job": "", "train_steps": 10, "tokens_per_step": 8, "launched": 0.0}


def job(job_id: str, state: str = "RUNNING", name: str = "run-abc") -> Job:
    return Job(job_id=job_id, name=name, state=state, reason="None", elapsed="1:00", left="1:00", nodes="n1")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    write_json(run.facts_file, FACTS)
    return run


def test_of_two_launches_at_once_one_is_refused(run: RunFolder) -> None:
    refused = pytest.raises(UserError, match=r"launch is being written by process \d+ on .*: wait for it, then see")
    with prepare.one_launch(run.launch), refused, prepare.one_launch(run.launch):
        raise AssertionError
    with prepare.one_launch(run.launch):
        pass
    assert [path.name for path in run.run_dir.iterdir()] == ["launch"]


def test_a_job_that_an_interrupted_launch_left_is_found_by_its_name(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job("7"), job("8", "PENDING"), job("9", name="another"), job("6", "COMPLETED")]
    found = status.row(run.run_dir, {one.job_id: one for one in jobs})
    assert (found["job"], found["state"]) == ("7", "running")
    cancelled: list[str] = []
    monkeypatch.setattr(status.slurm, "queue", lambda timeout: jobs)
    monkeypatch.setattr(status.slurm, "cancel", cancelled.append)
    assert status.cancel(run.run_dir).startswith("job 7 and 8 cancelled")
    assert cancelled == ["7", "8"]


def stand_in(monkeypatch: pytest.MonkeyPatch, jobs: list[Job], submit: Callable[[Path], str]) -> None:
    """A cluster of one node with ``jobs`` in its queue."""
    nodes = (slurm.Node(name="n1", state="idle", cpus=8, gpus=0),)
    main_partition = slurm.Partition(name="main", state="UP", max_minutes=None, max_nodes=None, nodes=nodes)
    monkeypatch.setattr(slurm, "partitions", lambda names: [main_partition])
    monkeypatch.setattr(slurm, "accounts", lambda: None)
    monkeypatch.setattr(slurm, "queue", lambda timeout=60: list(jobs))
    monkeypatch.setattr(slurm, "submit", submit)


def test_if_only_the_job_of_then_fails_the_job_of_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit(script: Path) -> str:
        if script.name == "then.sbatch":
            raise slurm.SlurmError("sbatch: no more jobs")
        return "7"

    stand_in(monkeypatch, [], submit)
    recipe, site = write_recipe(tmp_path, tmp_path, steps=10), write_site(tmp_path / "site.toml")
    command = ["launch", str(recipe), "--nodes", "1", "--time", "10", "--site", str(site), "--then", "true"]
    assert main(command) == 2
    told = capsys.readouterr()
    assert told.out.startswith("job         7\n") and "qwen-moe cancel" in told.out
    assert "job 7 of the run was submitted, but that of --then" in told.err and "no more jobs" in told.err


def test_tasks_that_an_interrupted_launch_of_an_array_left_are_found_by_its_name_and_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process may also be killed there: nothing is written after Slurm has got the array."""
    ladder = tmp_path / "ladder"
    ladder.mkdir()
    for name in ("a", "b"):
        write_recipe(ladder, tmp_path, steps=10, name=name)
    jobs: list[Job] = []

    def submit(script: Path) -> str:
        name = next(line for line in script.read_text().splitlines() if "--job-name=" in line).partition("=")[2]
        start = 20 if jobs else 10
        jobs.extend([job(f"{start}_0", name=name), job(f"{start}_1", "PENDING", name)])
        raise KeyboardInterrupt

    stand_in(monkeypatch, jobs, submit)
    command = ["launch", str(ladder), "--array", "--nodes", "1", "--time", "10", "--site"]
    command.append(str(write_site(tmp_path / "site.toml")))
    assert main(command) == 130
    assert "see `qwen-moe status" in capsys.readouterr().err
    rows = [status.row(ladder / name, {one.job_id: one for one in jobs}) for name in ("a", "b")]
    assert [(row["job"], row["state"]) for row in rows] == [("10_0", "running"), ("10_1", "pending")]
    assert main(command) == 2
    assert "are complete or in the queue: nothing to launch" in capsys.readouterr().err
    assert main(["launch", str(ladder / "b.yaml"), *command[3:]]) == 2
    assert "is already in the queue as job 10_1" in capsys.readouterr().err

    # The run of task 1 is launched again. It is task 0 of a second array, whose name is not that of the first one.
    del jobs[1]
    assert main(command) == 130
    found = [status.row(ladder / name, {one.job_id: one for one in jobs})["job"] for name in ("a", "b")]
    assert found == ["10_0", "20_0"]


LINE = "slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-29T10:00:05{} ***\n"


@pytest.mark.parametrize(
    ("facts", "log", "expected"),
    [
        ({}, LINE.format(""), True),
        ({}, LINE.format("") + "conductor: a line\n" * 500, True),
        ({"JobState": "CANCELLED"}, "", True),
        ({"JobState": "RUNNING"}, LINE.format(""), False),  # scancel --signal=TERM, preemption with a time of grace
        ({"StartTime": "2026-11-29T10:00:06"}, LINE.format(""), False),  # of the job's earlier start
        ({"JobId": "1"}, LINE.format(""), False),
        ({}, LINE.format(" DUE TO TIME LIMIT") + LINE.format(" DUE TO JOB REQUEUE"), False),
        ({}, "", False),
        ({"StdOut": ""}, LINE.format(""), False),
    ],
)
def test_scancel_is_told_from_other_ends(tmp_path: Path, facts: dict[str, str], log: str, expected: bool) -> None:
    write_text(tmp_path / "slurm-12.out", log)
    there = {"JobId": "12", "JobState": "COMPLETING", "StartTime": "2026-11-29T09:59:00"}
    assert scancelled(there | {"StdOut": str(tmp_path / "slurm-12.out")} | facts) == expected
    assert not scancelled({})


@pytest.mark.parametrize(
    "decision", [None, {"action": "requeue", "kind": "terminated", "reason": "why", "started": 1.0}]
)
def test_following_the_logs_of_a_run_ends_with_its_job(
    run: RunFolder, decision: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = run.new_attempt()
    write_text(attempt.folder / "ranks" / "rank-00000.log", "10:00 a line\n")
    if decision is not None:
        attempt.write("decision.json", decision)
    ended = status.Ended(run, seconds=0)
    queue: list[Job] = [job("7")]
    monkeypatch.setattr(status.slurm, "queue", lambda timeout: queue)
    assert ended() == ""
    found: list[str] = []
    reader = threading.Thread(
        target=lambda: found.extend(logs.follow(run, attempt, poll_seconds=0.01, ended=ended)), daemon=True
    )
    reader.start()
    reader.join(0.3)
    assert reader.is_alive(), found
    queue.clear()
    reader.join(20)
    assert not reader.is_alive()
    assert (
        found[0] == "10:00 [rank 0] a line" and found[-1] == "-- the run has ended: its job (none) is not in the queue"
    )


def test_following_the_logs_of_a_run_whose_folder_is_gone(run: RunFolder) -> None:
    run.facts_file.unlink()
    with pytest.raises(LaunchError, match="is not a launched run"):
        status.Ended(run, seconds=0)()


def test_the_logs_of_a_run_that_was_cancelled_in_the_queue_are_not_waited_for(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "ask_queue", lambda: ({}, ""))
    monkeypatch.setattr(status.Ended, "__init__", functools.partialmethod(status.Ended.__init__, seconds=0))
    assert main(["logs", str(run.run_dir), "--follow"]) == 2
    assert "has no logs: the run has ended: its job (none) is not in the queue" in capsys.readouterr().err
