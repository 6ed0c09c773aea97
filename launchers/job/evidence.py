"""Reads the files that ranks, agents and nodes of one attempt left: failures, heartbeats and silent ranks."""

import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

from launchers.folder.logs import read_tail
from launchers.folder.run_folder import Attempt, rank_name
from launchers.job.decide import AGENT, CRASH, DISK, KILLED, Failure, classify, in_order_of_blame

_LEAST_BYTES = 65536  # with less, reports may not have been written
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception): ")
_SRUN_EXIT = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: (.*)")


def exit_text(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    more = " (kill -9, or the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
    return f"killed by {name}{more}"


def collect_failures(attempt: Attempt) -> list[Failure]:
    """Failures of an attempt, root causes first: the ranks' own reports, or else what their agents saw."""
    said = {int(report["rank"]): report for report in attempt.read_all("errors").values()}
    found: dict[int, Failure] = {
        rank: Failure(
            rank=rank,
            host=report["host"],
            kind=report["kind"],
            message=report["message"],
            time=report["time"],
        )
        for rank, report in said.items()
    }
    for host, deaths in attempt.read_all("failures").items():
        for death in deaths:
            rank = int(death["rank"])
            if rank not in found:
                code = int(death["exit_code"])
                found[rank] = Failure(
                    rank=rank,
                    host=host,
                    kind=KILLED if code < 0 else CRASH,
                    message=exit_text(code) + _last_line(attempt, rank),
                    time=float(death["time"]),
                )
    for host, report in attempt.read_all("nodes").items():
        death = report.get("death")
        if death and int(death["rank"]) not in found:
            rank = int(death["rank"])
            found[rank] = Failure(
                rank=rank, host=host, kind=KILLED, message="died" + _last_line(attempt, rank), time=death["time"]
            )
    if not found:
        found |= _agents_that_failed(attempt)
    return in_order_of_blame(list(found.values()))


def no_room(run_dir: Path) -> list[Failure]:
    """A failure if the run folder's disk is full: then neither ranks nor agents could write why they failed."""
    try:
        free = shutil.disk_usage(run_dir).free
    except OSError:
        return []
    if free >= _LEAST_BYTES:
        return []
    message = f"no space left on the disk of {run_dir}: free some, then launch again, which resumes the run"
    return [Failure(rank=-1, host=socket.gethostname(), kind=DISK, message=message, time=time.time())]


def _last_line(attempt: Attempt, rank: int) -> str:
    """The last line of a rank that could not report, if that line describes an error."""
    tail = read_tail(attempt.folder / "ranks" / f"{rank_name(rank)}.log", 1)
    words = tail.partition(" ")[2].strip()
    return f"; its last line: {words[:200]}" if re.search(r"error|fault|abort|terminate", words, re.IGNORECASE) else ""


def _agents_that_failed(attempt: Attempt) -> dict[int, Failure]:
    """Nodes whose agent failed before it started ranks: srun names them, and the lines before say why. On this machine
    there is no srun, and the last line is that of a traceback."""
    tail = read_tail(attempt.folder / "srun.log", 200)
    words = [line.strip() for line in tail.splitlines() if line.strip() and not line.startswith("srun:")]
    found: dict[int, Failure] = {}
    for number, (host, how) in enumerate(_SRUN_EXIT.findall(tail)):
        if "Killed" in how or "Terminated" in how:
            continue
        message = f"{how}; {words[-1][:300]}" if words else how
        found[-1 - number] = Failure(rank=-1, host=host, kind=AGENT, message=message, time=0.0)
    if "srun:" not in tail and words and _EXCEPTION.match(words[-1]):
        kind = DISK if classify(words[-1]) == DISK else AGENT
        found[-1] = Failure(rank=-1, host="localhost", kind=kind, message=words[-1][:300], time=0.0)
    return found


def heartbeat_mark(attempt: Attempt) -> Any:
    """A value that changes whenever any rank gives a sign of life."""
    return [
        (host, rank, state["pid"], state["beats"])
        for host, report in attempt.read_all("nodes").items()
        for rank, state in report["ranks"].items()
    ]


def phases(attempt: Attempt) -> set[str]:
    """Phases that ranks are in."""
    return {state["phase"] for report in attempt.read_all("nodes").values() for state in report["ranks"].values()}


def silent_ranks(attempt: Attempt) -> tuple[tuple[int, str, str], ...]:
    """(rank, host, process state) of ranks that did not answer when asked for their stack."""
    found = []
    for host, report in attempt.read_all("nodes").items():
        for rank, answer in report["stacks"].items():
            if answer == "silent":
                found.append((int(rank), host, report["ranks"][rank]["state"]))
    return tuple(sorted(found))


def describe_error(text: str) -> tuple[str, str]:
    """(kind, last line) of a traceback."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return classify(text), (lines[-1].strip()[:500] if lines else "no message")
