"""What is said of ranks that do not come back: the cause, then what the others saw of it."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.local_group import RankFailed, run_local
from tests.distributed import run_distributed


def meet(mistake: str, tries: Path | None = None) -> int:
    """Two collectives, with rank 1's mistake between them; with ``tries`` (a folder), the first time only."""
    if tries is not None and dist.get_rank() == 1:
        mistake = "" if (tries / "tried").exists() else mistake
        (tries / "tried").touch()
    dist.all_reduce(torch.ones(4))
    if dist.get_rank() == 1:
        if mistake == "raise":
            raise ValueError("rank 1's own words")
        if mistake == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mistake == "segmentation fault":
            ctypes.string_at(0)
        if mistake == "sleep":
            time.sleep(60)
    dist.all_reduce(torch.ones(4))
    return dist.get_rank()


def test_results_are_in_the_order_of_ranks() -> None:
    assert run_local(meet, 3, "") == [0, 1, 2]


@pytest.mark.parametrize(
    ("mistake", "cause", "detail"),
    [
        ("raise", "ValueError: rank 1's own words", "raise ValueError"),
        ("kill", "rank 1 of 3 died without a result (SIGKILL)", ""),
        ("segmentation fault", "rank 1 of 3 died without a result (SIGSEGV)", "in string_at"),
    ],
)
def test_the_cause_comes_before_its_echoes(mistake: str, cause: str, detail: str) -> None:
    with pytest.raises(RankFailed) as failure:
        run_local(meet, 3, mistake)
    assert failure.value.cause == cause
    told = str(failure.value)
    assert told.startswith("rank 1 of 3") and cause in told and detail in told
    assert "rank 0 of 3: Traceback" in told[told.index(cause) :] and "by peer" in told


def test_a_crash_is_tried_once_more_by_the_tests_and_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"meet is run once more: rank 1 of 2 died without a result \(SIGSEGV\)"):
        assert run_distributed(meet, 2, "segmentation fault", tmp_path) == [0, 1]
    with pytest.warns(UserWarning), pytest.raises(RankFailed):
        run_distributed(meet, 2, "segmentation fault")
    with pytest.raises(RankFailed, match="rank 1's own words"):
        run_distributed(meet, 2, "raise")


def test_a_rank_that_hangs_is_named_and_killed() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed) as failure:
        run_local(meet, 2, "sleep", timeout=5)
    assert failure.value.cause == "ranks [0, 1] of 2 still ran after 5 s" and time.monotonic() - started < 40
