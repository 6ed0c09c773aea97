"""How many CPU threads a process gets: from a machine that is made of files in a folder, and in which order of say."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel import threads
from parallel.threads import DECIDED, OMP, available_cpus, cgroup_cpus, choose_threads


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen CPUs, eight of which this process may use, idle, without a quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(threads, "cgroup_cpus", lambda root: None if root == Path("/") else cgroup_cpus(root))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "5:memory:/m\n4:cpu,cpuacct:/job/step\n"
CASES: list[tuple[dict[str, str], float | None]] = [
    ({}, None),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
    # The smallest on the way up counts, not the nearest.
    (
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/cpu.max": "600000 100000\n",
            "sys/fs/cgroup/job/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
        3.0,
    ),
    # In a container the path is the host's, and the top is the container's own.
    ({"proc/self/cgroup": "0::/host/docker/abc\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
    (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
        1.5,
    ),
    (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
        },
        8.0,
    ),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "damaged\n"}, None),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
]


@pytest.mark.parametrize(("files", "cpus"), CASES)
def test_the_quota_of_the_cgroup(files: dict[str, str], cpus: float | None, tmp_path: Path) -> None:
    assert cgroup_cpus(write(tmp_path, files)) == cpus


@pytest.mark.parametrize(("quota", "count"), [("20000", 1), ("150000", 1), ("180000", 2), ("600000", 6)])
def test_a_quota_below_the_affinity_counts(quota: str, count: int, tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert available_cpus(root) == (count, f"the cgroup allows {int(quota) / 100000:g} of 8")


def test_the_affinity_counts_where_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1200000 100000\n"})
    assert available_cpus(root) == (8, "affinity allows 8 of 16")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert available_cpus(root) == (8, "all of the machine's")


def test_who_has_a_say_and_in_which_order() -> None:
    everything = {DECIDED: "5 because", OMP: "6,2"}
    assert choose_threads(2, asked=7, before=3, environ=everything).count == 7
    assert choose_threads(2, before=3, environ=everything) == threads.Threads(count=5, why="because")
    assert choose_threads(2, before=3, environ={OMP: "6,2"}) == threads.Threads(count=6, why=f"{OMP} is set")
    found = choose_threads(2, before=3, environ={})
    assert found.count == 3 and found.why.startswith("as in this run's earlier attempts")
    assert choose_threads(2, environ={}).count == 4 and choose_threads(1, environ={}).count == 8
    assert choose_threads(100, environ={}).count == 1


@pytest.mark.parametrize("environ", [{DECIDED: "0 x"}, {DECIDED: "many"}, {OMP: "0"}, {OMP: "all"}, {OMP: ""}])
def test_what_is_no_count_has_no_say(environ: dict[str, str]) -> None:
    assert choose_threads(1, environ=environ).count == 8


def test_torchruns_own_one_is_no_users_choice() -> None:
    torchrun = {OMP: "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}
    assert choose_threads(4, environ=torchrun).count == 2
    assert choose_threads(4, environ=torchrun | {OMP: "3"}).count == 3
    assert choose_threads(4, environ={OMP: "1"}).count == 1


def test_an_earlier_count_that_the_machine_no_longer_has_is_said() -> None:
    found = choose_threads(2, before=6, environ={})
    assert found.count == 4 and "earlier attempts had 6, so rounding may differ from theirs" in found.why


def _busy(monkeypatch: pytest.MonkeyPatch, cpus: float) -> list[float]:
    """Others keep ``cpus`` of this process's CPUs busy; the seconds that were waited to see it."""
    clock, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(os, "getloadavg", lambda: (cpus, cpus, cpus))
    monkeypatch.setattr(
        threads, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0], process_time=lambda: 1.0)
    )
    monkeypatch.setattr(threads, "_busy_ticks", lambda: cpus * clock[0] * os.sysconf("SC_CLK_TCK"))
    return slept


@pytest.mark.parametrize(("cpus", "count"), [(3.0, 5), (2.8, 5), (7.9, 1), (30.0, 1)])
def test_what_others_keep_busy_is_left_to_them(cpus: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = _busy(monkeypatch, cpus)
    found = choose_threads(1, environ={})
    assert found.count == count and f"of which others keep {cpus:.1f} busy" in found.why and slept == [0.4]
    assert choose_threads(1, load=False, environ={}).count == 8
    assert choose_threads(1, before=8, environ={}).count == 8  # the rounding of the run matters more


def test_an_idle_machine_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = _busy(monkeypatch, 0.2)
    assert choose_threads(1, environ={}).count == 8 and not slept


def test_a_command_of_one_process_is_limited_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(set_num_threads=told.append))
    monkeypatch.delenv(DECIDED, raising=False)
    monkeypatch.setenv(OMP, "3")
    threads.limit_threads()
    assert not told and os.environ[OMP] == "3" and not capsys.readouterr().err
    monkeypatch.delenv(OMP)
    threads.limit_threads()
    assert told == [8] and os.environ[OMP] == "8"
    assert capsys.readouterr().err == "8 CPU threads per process: 8 CPUs (affinity allows 8 of 16)\n"
