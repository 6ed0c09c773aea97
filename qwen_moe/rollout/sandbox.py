"""Runs reward functions and the code of answers in processes with limits, several at a time. On macOS, fewer limits hold.

What it does: each process has a limit of wall-clock time, processor time, address space and, for code, of file sizes; what
hangs is killed with all its descendants, and what runs ends when this process ends, however it ends. Code runs in a new
process and an empty folder each time, without our environment variables.

What it does not do: the code runs as the same user. It can read and write what this user may, reach the network, and use
memory and processor time in many processes at once until its time is over. It can also pass its tests by cheating, since
both run in one process. For code that may be hostile, start the command inside a container or virtual machine.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from qwen_moe.data.encode import check_workers
from qwen_moe.errors import UserError

_WARDEN = Path(__file__).with_name("warden.py")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A call of ``function`` with ``arguments``, or else ``code`` and its ``tests``."""

    function: str = ""
    arguments: tuple[Any, ...] = ()
    code: str = ""
    tests: tuple[str, ...] = ()

    def request(self) -> dict[str, Any]:
        if self.function:
            return {"call": self.function, "arguments": self.arguments}
        return {"code": self.code, "tests": self.tests}


@dataclass(frozen=True)
class Failure:
    """``kind``: took too long, died, raised an exception, returned no finite number, gave no answer; failed (of tests)."""

    kind: str
    text: str


class Sandbox:
    """``workers`` (0: one per core) processes, started when they are first needed. ``seconds`` and ``memory_mib``: for one
    job. Safe to use from several threads."""

    def __init__(self, *, seconds: float, memory_mib: int, workers: int = 0) -> None:
        self._arguments = [str(seconds), str(memory_mib << 20)]
        self._count = check_workers(workers)
        self._idle: SimpleQueue[_Warden] = SimpleQueue()
        self._all: list[_Warden] = []
        for _ in range(self._count):
            self._all.append(_Warden(self._arguments))
            self._idle.put(self._all[-1])

    def load(self, function: str) -> str:
        """Import a function in one of the processes. Returns its file, empty for rewards of ours. Raises UserError."""
        outcome = self._ask({"load": function})
        if "kind" in outcome:
            raise UserError(
                f"reward {function} cannot be used: {outcome['text']}. Give MODULE:FUNCTION of a module that Python finds "
                "from the current folder, and a function of (prompt, completion, row)"
            )
        return str(outcome["value"])

    def run(self, jobs: Sequence[Job]) -> list[float | Failure]:
        """What each job returned, in their order."""
        if not jobs:
            return []
        with ThreadPoolExecutor(min(self._count, len(jobs))) as threads:
            return list(threads.map(self._run, jobs))

    def _run(self, job: Job) -> float | Failure:
        outcome = self._ask(job.request())
        if "kind" in outcome:
            return Failure(str(outcome["kind"]), str(outcome["text"]))
        return float(outcome["value"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        warden = self._idle.get()
        try:
            return warden.ask(request)
        finally:
            self._idle.put(warden)

    def close(self) -> None:
        for warden in self._all:
            warden.close()


class _Warden:
    """One `warden.py`, started at the first request and again after its end."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = [sys.executable, "-I", "-S", str(_WARDEN), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
            assert self._process.stdin is not None and self._process.stdout is not None
            line = b""
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            if not line.endswith(b"\n"):
                self._end()
                return {"kind": "died", "text": "the process that watches it was ended, perhaps for lack of memory"}
            answer: dict[str, Any] = json.loads(line)
            return answer

    def close(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # it then ends what it runs
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            os.kill(self._process.pid, 9)
            self._process.wait()
        self._process.stdout.close()
        self._process = None
