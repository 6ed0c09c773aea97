"""What a job starts on its nodes: the module that launch.json names, also for jobs that an earlier version submitted."""

import errno
import json
import os
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launchers.folder.atomic import write_json
from launchers.folder.run_folder import Attempt, RunFolder
from launchers.folder.snapshot import code_hash
from launchers.job import conductor, evidence, node_facts
from launchers.job.decide import Evidence, Failure, Limits, PastAttempt, decide
from launchers.slurm.site import Site

ROOT = Path(__file__).parents[3]


def launched(folder: Path, **facts: Any) -> RunFolder:
    """A run that `qwen-moe cancel` has marked, so that the conductor stops after one attempt."""
    run = RunFolder(folder / "run")
    site = Site()
    common = {"launched": 1.0, "train_steps": 10, "tokens_per_step": 32, "processes_per_node": 1, "signal_seconds": 30}
    common |= {"local_folder": str(folder), "python": "python3", "survive": asdict(site.survive)}
    write_json(run.facts_file, common | {"preflight": asdict(site.preflight) | {"level": "off"}} | facts)
    write_json(run.launch / "cancelled.json", {})
    return run


def arguments(folder: Path, run: RunFolder) -> list[str]:
    """Of the conductor; what it starts writes its own arguments down."""
    script = folder / "on_every_node"
    script.write_text(f'#!/bin/sh\necho "$@" > {folder}/started\n')
    script.chmod(0o755)
    return ["--run", str(run.run_dir), "--local", "--", str(script)]


def test_what_runs_on_the_nodes_is_what_launch_json_names(tmp_path: Path) -> None:
    run = launched(tmp_path, agent="some.module", packages=["some"])
    assert conductor.main(arguments(tmp_path, run)) == 1
    attempt = run.attempts()[0]
    assert (tmp_path / "started").read_text() == f"-m some.module {attempt.folder} train\n"
    assert attempt.read("plan.json")["packages"] == ["some"]
    assert attempt.read("decision.json")["kind"] == "cancelled"


def test_a_command_of_slurm_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """scancel of a job that begins also ends the `scontrol` that the conductor has just started."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\nkill -TERM $$\n")
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    run = launched(tmp_path, agent="some.module")
    command = [word for word in arguments(tmp_path, run) if word != "--local"]
    assert conductor.main(command) == 1
    told = capsys.readouterr().err
    assert told == "error: scontrol: exit code -15\n" and not (tmp_path / "started").exists()


def test_a_full_disk_stops_the_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the ranks, nor the agent, nor the conductor can write what happened."""
    run = launched(tmp_path, agent="some.module")
    (run.launch / "cancelled.json").unlink()
    command = arguments(tmp_path, run)
    (tmp_path / "on_every_node").write_text("#!/bin/sh\nexit 1\n")
    written = Attempt.write

    def full(self: Attempt, name: str, value: Any, **options: Any) -> None:
        if name == "decision.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(self, name, value, **options)

    monkeypatch.setattr(Attempt, "write", full)
    monkeypatch.setattr(evidence.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert conductor.main(command) == 1
    told = capsys.readouterr().out
    assert "attempt 1: stop (disk): " in told and f"no space left on the disk of {run.run_dir}: free some" in told
    assert "decision.json could not be written: No space left on device" in told and "attempt 2" not in told


# `scancel --signal=INT` during the preflight stopped the run for good: "no node reported its facts".
@pytest.mark.parametrize("how", ["kill -INT $$", "exit 130", "exit 143"])
def test_a_signal_during_the_preflight_is_not_the_nodes_fault(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launched(tmp_path, agent="some.module", preflight=asdict(Site().preflight) | {"level": "quick"})
    (run.launch / "cancelled.json").unlink()
    command = arguments(tmp_path, run)
    (tmp_path / "on_every_node").write_text(f"#!/bin/sh\n{how}\n")
    assert conductor.main(command) == 130
    assert "attempt 1: requeue (terminated): stopped from outside" in capsys.readouterr().out


# Its second failure in a row stopped `launch --local`, because "localhost" was to be left out.
def test_one_machine_goes_on_after_failures_as_long_as_there_is_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launched(tmp_path, agent="some.module")
    (run.launch / "cancelled.json").unlink()
    command = arguments(tmp_path, run)
    (tmp_path / "on_every_node").write_text(f"""#!/bin/sh
        folder=$3; number=$(basename $folder)
        mkdir -p {run.run_dir}/checkpoints/step_00000$number $folder/failures
        echo > {run.run_dir}/checkpoints/step_00000$number/manifest.json
        test $number = 004 && echo '{{"outcome": "complete"}}' > $folder/outcome.json && exit 0
        echo '[{{"rank": 0, "exit_code": -9, "time": 1.0, "pid": 1}}]' > $folder/failures/localhost.json; exit 1
    """)
    assert conductor.main(command) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert said.count("go on (failure): rank 0 on localhost") == 3 and "attempt 4: done" in said


class _Partition:
    can_requeue = True

    def __init__(self, spare: int | None) -> None:
        self.spare = spare

    def spare_nodes(self, excluded: list[str]) -> int | None:
        assert excluded == ["n0", "n1"]
        return self.spare


# Two failures in a row on one node stopped a run of a partition without another node, whatever it had saved between them.
@pytest.mark.parametrize("kind, without", [("hardware", "stop"), ("killed", "go on")])
@pytest.mark.parametrize("spare", [None, 1, 2])
def test_a_suspected_node_is_kept_where_none_can_replace_it(
    tmp_path: Path, spare: int | None, kind: str, without: str
) -> None:
    one = object.__new__(conductor.Conductor)
    one.run, one.cluster = launched(tmp_path), _Partition(spare)
    one.run.exclude_nodes({"n0": "broken"})
    failed = Failure(rank=0, host="n1", kind=kind, message="it ended", time=1.0)
    past = PastAttempt(kind="failure", progressed=True, host="n1")
    found = one._possible(decide(Evidence(failures=(failed,), saved_after=9, history=(past,)), Limits()), ["n1", "n2"])
    if spare == 1:
        assert found.action == without and "the partition has 1 usable of the 2 nodes that are needed" in found.reason
        assert (found.nodes == {}) == (without == "go on") == ("none is excluded" in found.reason)
    else:
        assert found.action == "exclude" and list(found.nodes) == ["n1"]


# By time alone, failures were not counted on nodes whose clock was behind that of the machine that launched: no attempt was
# the last one. And earlier failures counted where it was ahead.
@pytest.mark.parametrize("ahead", [None, -1000.0, 1000.0])
def test_failures_before_the_last_launch_do_not_count(tmp_path: Path, ahead: float | None) -> None:
    """Launching again says that the user has repaired what failed. Older launch.json have only the time."""
    run = launched(tmp_path, launched=100.0, **({} if ahead is None else {"earlier_attempts": 2}))
    for started, before, after in ((50.0, 0, 0), (99.0, 0, 5), (100.0, 5, 5), (150.0, 5, 8)):
        evidence = {"saved_before": before, "saved_after": after}
        said = {"action": "go on", "kind": "failure", "reason": "", "host": f"at {started:.0f}"}
        run.new_attempt().write("decision.json", said | {"started": started + (ahead or 0), "evidence": evidence})
    one = object.__new__(conductor.Conductor)
    one.run, one.facts = run, run.facts()
    found = one._history(run.new_attempt())
    assert [(past.host, past.progressed) for past in found] == [("at 100", False), ("at 150", True)]


@pytest.mark.parametrize("facts", [{}, {"agent": 5}, {"agent": ""}])
def test_a_launch_file_that_names_nothing_to_start_is_damaged(
    tmp_path: Path, facts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = launched(tmp_path, **facts)
    assert conductor.main(arguments(tmp_path, run)) == 2
    assert f"error: {run.facts_file} is damaged: its agent is" in capsys.readouterr().err
    assert not (tmp_path / "started").exists() and run.attempts() == []


def test_a_job_of_an_earlier_version_goes_on_after_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script calls the conductor by its old name, and its launch.json says nothing of an agent."""
    run = launched(tmp_path)
    monkeypatch.setattr(sys, "argv", ["conductor", *arguments(tmp_path, run)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("launchers.conductor", run_name="__main__")
    assert end.value.code == 1
    attempt = run.attempts()[0]
    assert (tmp_path / "started").read_text() == f"-m qwen_moe.launch.agent {attempt.folder} train\n"
    assert "qwen_moe" in attempt.read("plan.json")["packages"]


@pytest.mark.parametrize("packages", [["launchers"], None])
def test_a_node_reports_the_code_of_the_packages_in_the_plan(
    tmp_path: Path, packages: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of an earlier version names none: a node then still answers, under the module's old name."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    attempt = launched(tmp_path).new_attempt()
    plan = {"preflight": asdict(Site().preflight), "local_folder": str(tmp_path)}
    attempt.write("plan.json", plan | ({"packages": packages} if packages else {}))
    if packages:
        assert node_facts.main(str(attempt.folder)) == 0
    else:
        monkeypatch.setattr(sys, "argv", ["node_facts", str(attempt.folder)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("launchers.node_facts", run_name="__main__")
        assert end.value.code == 0
    facts = json.loads((attempt.folder / "facts" / "localhost.json").read_text())
    assert facts["code"] == code_hash(ROOT, packages or [])
    assert code_hash(ROOT, ["launchers"]) != code_hash(ROOT, [])
