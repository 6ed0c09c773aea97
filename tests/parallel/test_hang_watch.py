"""A hang ends with every rank's place named; ranks that make different collectives are found out."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from parallel.hang_watch import HUNG
from parallel.trace import Collective, behind, first_mismatch
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[2]


def call(number: int, name: str = "all_reduce", shape: tuple[int, ...] = (3,), **changes: object) -> Collective:
    values: dict[str, object] = {
        "group": "tp",
        "ranks": (0, 1),
        "number": number,
        "name": name,
        "shapes": (shape,),
        "dtypes": ("Float",),
        "done": True,
        "age": 0.0,
        "called_from": "x.py:1 in f",
    }
    return Collective(**(values | changes))  # type: ignore[arg-type]


def test_the_first_difference_is_named() -> None:
    same = [call(1), call(2, "all_gather"), call(3)]
    assert first_mismatch({0: same, 1: same}) is None
    for other in (call(2), call(2, "all_gather", (4,)), call(2, "all_gather", dtypes=("Double",))):
        found = first_mismatch({0: same, 1: [call(1), other, call(3, shape=(9,))]})
        assert found is not None and "ranks 0 and 1 of tp" in found and "number 2" in found
    rows = {0: [call(1, "all_to_all", (5, 8))], 1: [call(1, "all_to_all", (2, 8))]}
    assert first_mismatch(rows) is None
    assert first_mismatch({0: rows[0], 1: [call(1, "all_to_all", (2, 9))]}) is not None


def test_only_what_both_have_recorded_is_compared() -> None:
    assert first_mismatch({0: [call(1), call(2, "x")], 1: [call(2, "x"), call(3)]}) is None
    assert first_mismatch({0: [call(1)], 1: [call(1, "x", ranks=(1, 2))]}) is None


def test_who_is_behind_is_named() -> None:
    found = behind({0: [call(1), call(2, done=False)], 1: [call(1)]})
    assert found is not None and "ranks [1] have not reached collective 2 of tp" in found
    assert behind({0: [call(1)], 1: [call(1)]}) is None


def _other_shape(different: bool) -> str:
    """Two all-gathers of the same number of bytes and another dtype: nothing fails by itself."""
    import torch
    import torch.distributed as dist

    from parallel.hang_watch import MismatchError, compare_collectives

    odd = different and dist.get_rank() == 1
    x = torch.zeros(4, dtype=torch.int32 if odd else torch.float32)
    dist.all_gather([torch.empty_like(x) for _ in range(2)], x)
    try:
        compare_collectives()
    except MismatchError as error:
        return str(error)
    return ""


def test_check_mode_sees_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    for message in run_distributed(_other_shape, 2, True):
        assert "Float[4]" in message and "Int[4]" in message
    assert run_distributed(_other_shape, 2, False) == ["", ""]


SCRIPT = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from parallel.process import process_info, start
from parallel.threads import Threads
from parallel.hang_watch import HangWatch

def never_comes():
    if sys.argv[2] == "sleep":
        time.sleep(600)
    os.kill(os.getpid(), 19)  # SIGSTOP

info = process_info()
start(info, Threads(count=1, why="test"))
watch = HangWatch(Path(sys.argv[1]), info.rank, info.world_size, limit=5.0, poll=1.0)
watch.start()
try:
    dist.all_reduce(torch.zeros(3))
    time.sleep(6)  # computing for longer than the limit is no hang
    if info.rank == 2:
        never_comes()
    dist.all_reduce(torch.zeros(5))
finally:
    watch.stop()
"""


@pytest.mark.parametrize("how", ["sleep", "stop"])
def test_a_hang_names_every_rank(tmp_path: Path, how: str) -> None:
    script = tmp_path / "hang.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "3", "PYTHONPATH": str(ROOT), "PATH": ""}
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "hang"), how],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        waiting = [p for rank, p in enumerate(processes) if how == "sleep" or rank != 2]
        told = "".join(p.communicate(timeout=60)[1] for p in waiting)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert {p.returncode for p in waiting} == {HUNG}
    assert told.count("the job is hung") == 1, told
    assert "rank 0: last collective" in told and "rank 1: last collective" in told and "Float[5]" in told
    if how == "sleep":
        assert "ranks [2] have not reached collective" in told and "never_comes" in told
    else:
        assert "no report from ranks [2]" in told
