"""One decision from the evidence: what is done, blamed, counted and limited; no cluster needed."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.folder.run_folder import Attempt, RunFolder
from launchers.job.decide import Evidence, Failure, Hang, Limits, PastAttempt, classify, decide, in_order_of_blame
from launchers.job.evidence import collect_failures, exit_text
from launchers.job.preflight import judge_bandwidth, judge_facts

LIMITS = Limits(max_restarts=6, max_failures_without_progress=2, exclude_after=2)


def failure(rank: int = 3, kind: str = "crash", host: str = "n1", time: float = 10.0, message: str = "boom") -> Failure:
    return Failure(rank=rank, host=host, kind=kind, message=message, time=time)


@pytest.mark.parametrize(
    ("evidence", "action", "kind"),
    [
        (Evidence(outcome="complete"), "done", "complete"),
        (Evidence(outcome="complete", warned="time limit"), "done", "complete"),
        (Evidence(cancelled=True, warned="terminated"), "stop", "cancelled"),
        (Evidence(warned="time limit", saved_after=8), "requeue", "time limit"),
        (Evidence(preempted=True, warned="terminated"), "requeue", "preemption"),
        (Evidence(warned="terminated"), "requeue", "terminated"),
        (Evidence(node_failed="n2", failures=(failure(kind="connection"),)), "requeue", "node failure"),
        (Evidence(failures=(failure(kind="user error"),)), "stop", "user error"),
        (Evidence(failures=(failure(kind="disk"),)), "stop", "disk"),
        (Evidence(failures=(failure(kind="bad step"),)), "stop", "bad step"),
        (Evidence(failures=(failure(),)), "go on", "failure"),
        (Evidence(failures=(failure(kind="hardware"),)), "exclude", "failure"),
        (Evidence(hang=Hang(seconds=600, silent=((5, "n2", "T"),))), "go on", "hang"),
        (Evidence(bad_nodes={"n2": "its clock is off"}), "exclude", "preflight"),
        (Evidence(preflight_problem="no node reported its facts"), "stop", "preflight"),
        (Evidence(exit_code=7), "go on", "failure"),
    ],
)
def test_what_follows_from_what_happened(evidence: Evidence, action: str, kind: str) -> None:
    decision = decide(evidence, LIMITS)
    assert (decision.action, decision.kind) == (action, kind) and decision.reason


@pytest.mark.parametrize("said", [{"warned": "terminated"}, {"warned": "time limit"}, {"preempted": True}])
def test_a_stop_before_which_nothing_was_saved_is_told_from_one_that_saved(said: dict[str, Any]) -> None:
    """`scancel --signal=TERM --full` also reaches srun, which then kills the ranks."""
    without = decide(Evidence(exit_code=137, saved_after=10, **said), LIMITS)
    assert "ended before they saved a checkpoint, so it resumes from the checkpoint of step 10" in without.reason
    saved = decide(Evidence(outcome="stopped", exit_code=0, saved_after=14, **said), LIMITS)
    assert saved.reason.endswith("checkpoint of step 14") and "before" not in saved.reason.replace(
        "before the time", ""
    )


def test_the_first_cause_is_named_not_its_echoes() -> None:
    """Rank 9 lost its connection first by the clock, because rank 2 had been killed."""
    echoes = [failure(rank, "connection", "n3", 10.0 + rank / 100) for rank in range(4, 120)]
    cause = failure(2, "killed", "n1", 10.9, "killed by SIGKILL")
    assert in_order_of_blame([*echoes, cause])[0] is cause
    decision = decide(Evidence(failures=(*echoes, cause)), LIMITS)
    assert decision.reason.startswith("rank 2 on n1: killed by SIGKILL") and decision.host == "n1"
    assert "116 others failed after it" in decision.reason
    mistake = failure(7, "user error", "n2", 99.0, "the tokenizer is gone")
    assert in_order_of_blame([*echoes, cause, mistake])[0] is mistake


def test_failures_without_progress_end_the_run_and_progress_starts_the_count_again() -> None:
    failed, saved = (
        PastAttempt(kind="failure", progressed=False, host="n9"),
        PastAttempt(kind="failure", progressed=True, host="n9"),
    )
    again = {"failures": (failure(host="n1"),), "saved_before": 5, "saved_after": 5}
    assert decide(Evidence(**again, history=(failed,)), LIMITS).action == "go on"
    stopped = decide(Evidence(**again, history=(failed, failed)), LIMITS)
    assert (stopped.action, stopped.kind) == ("stop", "no progress") and "3 attempts" in stopped.reason
    assert "boom" in stopped.reason and "still at step 5" in stopped.reason
    assert decide(Evidence(**again, history=(failed, failed, saved)), LIMITS).action == "go on"
    moved = again | {"saved_after": 6}
    assert decide(Evidence(**moved, history=(failed, failed)), LIMITS).action == "go on"
    # Preemption and failed nodes are not the run's doing.
    elsewhere = (PastAttempt(kind="preemption", progressed=False), PastAttempt(kind="node failure", progressed=False))
    assert decide(Evidence(**again, history=elsewhere), LIMITS).action == "go on"


def test_time_limits_without_a_checkpoint_between_them_end_the_run() -> None:
    """The limit is too short for one checkpoint: requeueing for ever would train nothing."""
    past = PastAttempt(kind="time limit", progressed=False)
    stopped = decide(Evidence(warned="time limit", history=(past, past)), LIMITS)
    assert (stopped.action, stopped.kind) == ("stop", "no progress")


def test_a_node_that_fails_again_is_left_out() -> None:
    past = PastAttempt(kind="failure", progressed=True, host="n1")
    decision = decide(Evidence(failures=(failure(host="n1"),), saved_after=9, history=(past,)), LIMITS)
    assert decision.action == "exclude" and list(decision.nodes) == ["n1"]
    assert decide(Evidence(failures=(failure(host="n2"),), saved_after=9, history=(past,)), LIMITS).action == "go on"


def test_a_failure_that_no_node_is_blamed_for_leaves_out_none() -> None:
    past = PastAttempt(kind="failure", progressed=True)
    decision = decide(Evidence(exit_code=7, saved_after=9, history=(past,) * 3), LIMITS)
    assert (decision.action, decision.nodes) == ("go on", {})


def test_restarts_are_limited() -> None:
    history = tuple(PastAttempt(kind="failure", progressed=True, host=f"n{i}") for i in range(6))
    stopped = decide(Evidence(failures=(failure(host="x"),), saved_after=9, history=history), LIMITS)
    assert (stopped.action, stopped.kind) == ("stop", "too many restarts")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out of memory"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "hardware"),
        ("NCCL WARN Cuda failure: Xid 79: GPU has fallen off the bus", "hardware"),
        ("RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3", "connection"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)", "connection"),
        ("OSError: [Errno 28] No space left on device", "disk"),
        ("ValueError: shapes do not match", "crash"),
    ],
)
def test_kinds_of_errors(text: str, kind: str) -> None:
    assert classify(text) == kind


def test_what_ranks_said_comes_before_what_their_agents_saw(tmp_path: Path) -> None:
    attempt = RunFolder(tmp_path).new_attempt()
    told = {"rank": 1, "host": "n1", "kind": "crash", "message": "ValueError: bad shape", "time": 5.0}
    attempt.write("errors/rank-00001.json", told)
    attempt.write(
        "failures/n1.json", [{"rank": 1, "exit_code": 1, "time": 6.0}, {"rank": 0, "exit_code": -9, "time": 4}]
    )
    found = collect_failures(attempt)
    assert [(f.rank, f.message) for f in found] == [
        (0, "killed by SIGKILL (kill -9, or the kernel's out-of-memory killer)"),
        (1, "ValueError: bad shape"),
    ]
    assert exit_text(3) == "exit code 3"


# A port that was taken in between: "the processes exited with code 1 and no error report".
@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("  File x\ntorch.distributed.DistNetworkError: port: 5, EADDRINUSE\n", [("agent", "EADDRINUSE")]),
        ("OSError: [Errno 28] No space left on device\n", [("disk", "No space left")]),
        ("training goes well\n", []),
        ("", []),
    ],
)
def test_an_agent_of_this_machine_says_why_it_failed(tmp_path: Path, log: str, expected: list[tuple[str, str]]) -> None:
    attempt = RunFolder(tmp_path).new_attempt()
    (attempt.folder / "srun.log").write_text(log)
    found = collect_failures(attempt)
    assert len(found) == len(expected)
    for failure, (kind, words) in zip(found, expected, strict=True):
        assert failure.kind == kind and words in failure.message and failure.host == "localhost"


def test_half_written_files_are_not_read(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "n1.json").write_text('{"ranks": ')
    (tmp_path / "nodes" / ".n2.json.x").write_text("{}")
    attempt.write("nodes/n3.json", {"ranks": {}})
    assert list(attempt.read_all("nodes")) == ["n3"]


LIMIT = {
    "min_free_disk_gb": 1.0,
    "max_clock_skew_seconds": 5.0,
    "max_ecc_errors": 0,
    "min_gpu_clock_share": 0.5,
    "min_all_reduce_gb_per_second": 10.0,
    "min_all_to_all_gb_per_second": 5.0,
}


def facts(**changes: object) -> dict[str, object]:
    gpu = {
        "index": "0",
        "name": "H100",
        "driver_version": "580.1",
        "clocks.sm": "1980",
        "clocks.max.sm": "1980",
        "ecc.errors.uncorrected.volatile.total": "0",
    }
    good = {
        "python": "3.12.1",
        "packages": {"torch": "2.11.0"},
        "code": "abc",
        "gpus": [gpu],
        "cpus": 8,
        "disk_free": 5e10,
        "disk_folder": "/tmp",
        "disk_error": "",
        "clock_skew": 0.1,
    }
    return json.loads(json.dumps(good | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"disk_free": 1e8}, "0.10 GB free"),
        ({"disk_error": "/tmp is not writable"}, "not writable"),
        ({"clock_skew": 60.0}, "its clock is"),
        ({"packages": {"torch": "2.10.0"}}, "packages differ from the other nodes': torch 2.10.0 (others 2.11.0)"),
        ({"code": "old"}, "code differ"),
        ({"gpus": []}, "GPUs differ"),
        ({"gpus": [{"error": "nvidia-smi did not answer"}]}, "did not answer"),
        ({"gpus": [facts()["gpus"][0] | {"ecc.errors.uncorrected.volatile.total": "2"}]}, "2 uncorrected ECC errors"),  # type: ignore[index]
        ({"gpus": [facts()["gpus"][0] | {"clocks.sm": "345"}]}, "runs at 345 of 1980 MHz"),  # type: ignore[index]
        ({"gpus": [facts()["gpus"][0] | {"driver_version": "550"}]}, "GPU driver differ"),  # type: ignore[index]
    ],
)
def test_a_bad_node_is_named(changes: dict[str, object], why: str) -> None:
    found = {"n1": facts(), "n2": facts(**changes), "n3": facts()}
    verdict = judge_facts(found, ["n1", "n2", "n3"], LIMIT, "abc")
    assert list(verdict.bad_nodes) == ["n2"] and why in verdict.bad_nodes["n2"], verdict
    assert not judge_facts({"n1": facts(), "n3": facts()}, ["n1", "n3"], LIMIT, "abc").bad_nodes


def test_silent_nodes() -> None:
    verdict = judge_facts({"n1": facts()}, ["n1", "n2"], LIMIT, "abc")
    assert verdict.bad_nodes == {"n2": "did not report its facts in time"}
    assert "no node reported" in judge_facts({}, ["n1", "n2"], LIMIT, "abc", "ImportError").problem


def test_the_slow_node_of_a_collective_is_found_by_pairs() -> None:
    fast = {"all_reduce": 2.0, "all_to_all": 2.0, "pair": 40.0}
    verdict = judge_bandwidth({"n1": fast, "n2": fast | {"pair": 2.5}, "n3": fast}, ["n1", "n2", "n3"], LIMIT)
    assert list(verdict.bad_nodes) == ["n2"] and "all-reduce at 2.000 GB/s" in verdict.bad_nodes["n2"]
    assert not judge_bandwidth(
        {n: fast | {"all_reduce": 20, "all_to_all": 9} for n in ("a", "b")}, ["a", "b"], LIMIT
    ).bad_nodes
    assert "no single node is to blame" in judge_bandwidth(dict.fromkeys(("a", "b"), fast), ["a", "b"], LIMIT).problem
