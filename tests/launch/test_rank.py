"""One rank of a launched run, by itself: what its report says decides whether the run goes on."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launchers.folder.run_folder import RunFolder
from launchers.job.decide import Evidence, Limits, decide
from launchers.job.evidence import collect_failures
from qwen_moe.launch.rank import _report_failure, share_of_cpus
from tests.small import model_values

# Rank 0 of two: it sees rank 1 arrive, and is killed before it says that the run may begin.
KILLED = """
import os, signal, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
print(store.port, flush=True)
while not store.check(["came/1"]):
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_whose_peer_is_killed_before_the_start_blames_no_user(tmp_path: Path) -> None:
    """As a user's error it would end the run for ever, where a new attempt is what helps."""
    recipe = tmp_path / "run.yaml"
    rest = {
        "data": {"train": [{"prefix": "unused"}], "sequence_length": 8},
        "training": {"micro_batch_size": 1, "global_batch_size": 2, "train_tokens": 160},
        "optimizer": {"learning_rate": 0.01},
    }
    recipe.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "model": model_values()} | rest))
    attempt = RunFolder(tmp_path / "run").new_attempt()
    attempt.write(
        "plan.json", {"recipe": str(recipe), "survive": {"stack_signal": "USR2", "checkpoint_signal": "USR1"}}
    )
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as rank0:
        assert rank0.stdout is not None
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": rank0.stdout.readline().strip()}
        ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "QWEN_MOE_NODE": "n2"}
        done = subprocess.run(
            [sys.executable, "-m", "qwen_moe.launch.rank", str(attempt.folder), str(tmp_path)],
            env=os.environ | place | ranks,
            timeout=120,
        )
        rank0.kill()
    log = (tmp_path / "rank-00001.log").read_text()
    assert "error: rank 0 at 127.0.0.1" in log and "Traceback" not in log, log
    assert done.returncode == 1
    failures = collect_failures(attempt)
    assert [(f.rank, f.host, f.kind) for f in failures] == [(1, "n2", "connection")], log
    assert decide(Evidence(failures=tuple(failures)), Limits()).action == "go on"


def test_ranks_share_the_cpus_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3, 5, 8}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append(set(cpus)), raising=False)
    for rank in range(2):
        share_of_cpus(rank, 2)
    assert bound == [{1, 2}, {3, 5}]
    share_of_cpus(0, 6)
    assert len(bound) == 2, "fewer CPUs than processes: none is bound"


def test_a_folder_that_is_read_only_is_said_as_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launched run said only `[Errno 30] Read-only file system: '...'`."""
    monkeypatch.setenv("QWEN_MOE_NODE", "n1")
    attempt = RunFolder(tmp_path / "run").new_attempt()
    problem = OSError(errno.EROFS, os.strerror(errno.EROFS), "/shared/step_00000020.partial")
    assert _report_failure(attempt, 0, problem) == 1
    (failure,) = collect_failures(attempt)
    assert failure.message == "/shared/step_00000020.partial: this file system is read-only: give another path"
    assert decide(Evidence(failures=(failure,)), Limits()).action == "go on"  # it may be this node's fault
