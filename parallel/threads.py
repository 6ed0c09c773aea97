"""Chooses the CPU threads of a process from its cgroup, its affinity and the load of other users. No torch."""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from parallel.counted import counted

OMP = "OMP_NUM_THREADS"
DECIDED = "QWEN_MOE_THREADS"  # "COUNT WHY", set by a process that has decided for its children
_SAMPLE_SECONDS = 0.4
_ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class Threads:
    """The number of threads of one process, and the reason for it as text."""

    count: int
    why: str

    def text(self) -> str:
        return f"{self.count} CPU thread{'s' if self.count > 1 else ''} per process: {self.why}"

    def environment(self) -> dict[str, str]:
        """Variables for child processes, so that they neither decide again nor start with more threads."""
        return {OMP: str(self.count), DECIDED: f"{self.count} {self.why}"}


def choose_threads(
    processes: int, asked: int = 0, *, load: bool = True, before: int = 0, environ: dict[str, str] | None = None
) -> Threads:
    """Threads for each of ``processes`` processes that share this machine (or this process's part of it).

    The first of these that applies: ``asked`` (the recipe's setting); the decision of a parent process; the user's
    OMP_NUM_THREADS; ``before``, the count of the run's earlier attempts if the machine still has as many CPUs (another
    count would change the rounding of sums); the CPUs of the affinity mask and the cgroup, less the CPUs that others keep
    busy now (``load``).
    """
    environ = dict(os.environ) if environ is None else environ
    if asked:
        return Threads(count=asked, why="launch.threads")
    count, _, why = environ.get(DECIDED, "").partition(" ")
    if count.isdecimal() and int(count):
        return Threads(count=int(count), why=why)
    if users := _users_own(environ):
        return Threads(count=users, why=f"{OMP} is set")
    allowed, limit = available_cpus()
    share = max(1, allowed // processes)
    divided = f" for {counted(processes, 'process')}" if processes > 1 else ""
    if before and before <= share:
        return Threads(count=before, why="as in this run's earlier attempts, so that the rounding stays the same")
    busy = busy_cpus() if load else 0.0
    free = max(1, math.floor(allowed - busy + 0.3))
    count_ = max(1, free // processes)
    why = f"{allowed} CPU{'s' if allowed > 1 else ''} ({limit}){divided}"
    if count_ < share:
        why += f", of which others keep {busy:.1f} busy; launch.threads or {OMP} overrides"
    if before:
        why += f"; earlier attempts had {before}, so rounding may differ from theirs"
    return Threads(count=count_, why=why)


def limit_threads() -> None:
    """Limit the threads of a one-process command before it imports torch, as `choose_threads` says. Prints the count when
    it is below the machine's CPUs."""
    if _users_own(dict(os.environ)):
        return
    threads = choose_threads(1)
    os.environ[OMP] = str(threads.count)
    if threads.count < (os.cpu_count() or 1):
        print(threads.text(), file=sys.stderr)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads.count)


def _users_own(environ: dict[str, str]) -> int:
    """The user's OMP_NUM_THREADS (the first number of a list such as `4,2`), or 0. When the user sets nothing, torchrun sets
    it to 1 for several processes. A user's 1 cannot be told from torchrun's, so 1 under torchrun is ignored."""
    first = environ.get(OMP, "").split(",")[0].strip()
    if not first.isdecimal() or not int(first):
        return 0
    if first == "1" and "TORCHELASTIC_RUN_ID" in environ and environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        return 0
    return int(first)


def available_cpus(root: Path = _ROOT) -> tuple[int, str]:
    """The CPUs that this process may use, and what limits them: its affinity mask (which includes cpusets) or its cgroup's
    quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus(root)
    if quota is not None and quota < allowed:
        return max(1, math.floor(quota + 0.3)), f"the cgroup allows {quota:g} of {allowed}"
    total = os.cpu_count() or allowed
    return allowed, f"affinity allows {allowed} of {total}" if allowed < total else "all of the machine's"


def cgroup_cpus(root: Path = _ROOT) -> float | None:
    """The smallest CPU quota of this process's cgroup and its parents, in CPUs; None without a quota. Reads cgroup v2
    (cpu.max) and v1 (cpu.cfs_quota_us)."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            bases = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"]
        else:
            continue
        for base in bases:
            folder = base / path.lstrip("/")
            # Inside a container the path may be the host's and not exist here; the base folder is then the container's own.
            for place in (folder, *folder.parents):
                if place.is_relative_to(base) and (cpus := _quota(place)) is not None:
                    quotas.append(cpus)
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()[:2]
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        return float(quota) / float(period) if quota.strip() not in ("max", "-1") and float(period) > 0 else None
    except (OSError, ValueError):
        return None


def busy_cpus() -> float:
    """How many of this process's CPUs other processes keep busy now. Returns at once on an idle machine."""
    try:
        if os.getloadavg()[0] < 0.3:
            return 0.0
    except OSError:
        return 0.0
    before, own, start = _busy_ticks(), time.process_time(), time.monotonic()
    if before is None:
        return 0.0
    time.sleep(_SAMPLE_SECONDS)
    after, seconds = _busy_ticks(), time.monotonic() - start
    if after is None:
        return 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    return max(0.0, (after - before) / ticks / seconds - (time.process_time() - own) / seconds)


def _busy_ticks() -> int | None:
    """Busy clock ticks since boot, summed over the CPUs of the affinity mask; None where /proc does not have them."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        cells = [line.split() for line in lines]
        # user, nice, system, idle, iowait, irq, softirq, steal
        return sum(sum(map(int, row[1:4])) + sum(map(int, row[6:9])) for row in cells if row and row[0] in allowed)
    except (OSError, ValueError, AttributeError):
        return None
