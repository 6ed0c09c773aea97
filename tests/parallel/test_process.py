"""Who this process is, from torchrun's or Slurm's variables."""

import socket

import pytest

from parallel import rendezvous
from parallel.process import ProcessError, ProcessInfo, process_info, start, started_by_launcher

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "70001",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def test_torchrun() -> None:
    assert started_by_launcher(TORCHRUN)
    assert process_info(TORCHRUN) == ProcessInfo(rank=5, world_size=8, local_rank=1, local_world_size=4)


def test_an_srun_step_of_several_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert started_by_launcher(SLURM)
    assert process_info(SLURM) == ProcessInfo(rank=3, world_size=4, local_rank=1, local_world_size=2)


def test_an_sbatch_script_or_a_single_task_is_not_a_launcher() -> None:
    assert not started_by_launcher({})
    assert not started_by_launcher({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    assert not started_by_launcher(SLURM | {"SLURM_STEP_NUM_TASKS": "1"})


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert process_info({}) == ProcessInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_an_incomplete_environment_is_named() -> None:
    with pytest.raises(
        ProcessError, match=r"incomplete: SLURM_STEP_NUM_TASKS is '4', but SLURM_PROCID is not set.*unset"
    ):
        process_info({key: value for key, value in SLURM.items() if key != "SLURM_PROCID"})
    with pytest.raises(ProcessError, match=r"incomplete: SLURM_STEP_NUM_TASKS is 'many', but .*'many'"):
        process_info(SLURM | {"SLURM_STEP_NUM_TASKS": "many"})


# Variables that an earlier job left in the shell gave a traceback, or an error that did not name them.
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RANK": "x"}, "RANK is 'x', expected a whole number of at least 0.* `unset RANK WORLD_SIZE"),
        ({"RANK": ""}, "RANK is '', expected a whole number"),
        ({"RANK": "-1"}, "RANK is '-1', expected a whole number"),
        ({"RANK": "8"}, "RANK is 8, expected one below WORLD_SIZE, which is 8"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', expected a whole number of at least 1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
    ],
)
def test_a_wrong_variable_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ProcessError, match=message):
        process_info(TORCHRUN | changes)


@pytest.mark.parametrize(
    "address, message",
    [
        ({}, "RANK is 0 and WORLD_SIZE is 2, but MASTER_ADDR is not set.*`unset RANK WORLD_SIZE"),
        ({"MASTER_ADDR": "n1"}, "MASTER_PORT is not set, expected a port"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "ssh"}, "MASTER_PORT is 'ssh', expected a port"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000', expected a port from 1 to 65535"),
    ],
)
def test_no_way_to_rank_0_is_said(address: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=message):
        start(ProcessInfo(rank=0, world_size=2, local_rank=0, local_world_size=2))


def test_waiting_for_rank_0_prints_notes_and_not_torchs_stack(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "SAY_SECONDS", 0.3)
    with pytest.raises(rendezvous.MeetingError, match=r"rank 1 of 2 waited 1 s for rank 0 .* and it did not come"):
        rendezvous.meet(1, 2, patience=1.0)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "note: rank 1 of 2 waits for rank 0" in said and "`unset RANK WORLD_SIZE`" in said
