"""Who this process is, from torchrun's or Slurm's variables."""

import pytest

from parallel.process import ProcessError, ProcessInfo, process_info, started_by_launcher

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
    with pytest.raises(ProcessError, match="incomplete"):
        process_info({key: value for key, value in SLURM.items() if key != "SLURM_PROCID"})
