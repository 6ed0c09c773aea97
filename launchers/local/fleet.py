"""Runs many commands on this machine, a few at a time: in order, with retries, one line of progress, and a common stop.

Each command must resume from what it saved when it is started again, stop gracefully on SIGTERM, and exit with code 2 on
an error that another attempt would meet again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launchers.counted import counted
from launchers.duration import clock
from launchers.local.orphans import before_exec
from launchers.local.signals import answered_by
from launchers.local.supervisor import USER_ERROR

POLL_SECONDS = 0.2
SHOWN_LINES = 5  # of a failed command's log


@dataclass(frozen=True, kw_only=True)
class Task:
    """``after`` names the task that must be complete before this one, if any. ``work`` is in any unit and serves to
    estimate the remaining time. ``complete``, ``busy`` (another process works on the task) and ``progress`` (share done, a
    few words) read the disk."""

    name: str
    command: tuple[str, ...]
    log: Path
    complete: Callable[[], bool]
    busy: Callable[[], bool]
    progress: Callable[[], tuple[float, str]]
    after: str = ""
    work: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """``state`` is complete, failed, blocked (the task before it did not complete) or stopped. ``why`` is empty if
    complete."""

    state: str
    why: str = ""


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    attempt: int


class Fleet:
    """Runs ``tasks``, at most ``parallel`` at a time, and retries each failed task at most ``retries`` times."""

    def __init__(self, tasks: Sequence[Task], *, parallel: int, retries: int, environment: Mapping[str, str]) -> None:
        self.tasks, self.parallel, self.retries = list(tasks), parallel, retries
        self.environment = dict(environment)
        self.results: dict[str, Result] = {}
        self._running: list[_Running] = []
        self._attempts: dict[str, int] = {}
        self._stopping = False
        self._tty = sys.stderr.isatty()
        self._told = 0.0
        self._begun, self._before = time.monotonic(), 0.0

    def run(self) -> dict[str, Result]:
        """Blocks until every task has a result. The first SIGINT, SIGTERM or SIGHUP stops all gracefully. A second SIGINT or
        SIGTERM kills."""
        for task in self.tasks:
            if task.complete():
                self.results[task.name] = Result(state="complete")
        self._before = self._work_done()
        try:
            with answered_by(self._stop):
                self._until_all_have_results()
        finally:
            if self._tty:
                print(file=sys.stderr)
        return {task.name: self.results[task.name] for task in self.tasks}

    def _until_all_have_results(self) -> None:
        try:
            while len(self.results) < len(self.tasks):
                self._reap()
                if self._stopping and not self._running:
                    for task in self._waiting():
                        self.results[task.name] = Result(state="stopped", why="not started")
                    break
                self._block()
                self._start_ready()
                self._tell()
                time.sleep(POLL_SECONDS)
        finally:
            self._end_all(signal.SIGKILL)  # processes are left only after an exception

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            self._end_all(signal.SIGKILL)
            return
        self._stopping = True
        print(
            "\nstopping: every run saves a step that has begun (interrupt again to stop at once) ...", file=sys.stderr
        )
        self._end_all(signal.SIGTERM)

    def _end_all(self, number: int) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.process.send_signal(number)

    def _waiting(self) -> list[Task]:
        active = {running.task.name for running in self._running}
        return [task for task in self.tasks if task.name not in self.results and task.name not in active]

    def _block(self) -> None:
        """Give up tasks whose ``after`` did not complete."""
        for task in self._waiting():
            before = self.results.get(task.after)
            if before is not None and before.state != "complete":
                self.results[task.name] = Result(state="blocked", why=f"{task.after} did not complete")

    def _start_ready(self) -> None:
        for task in self._waiting():
            if len(self._running) >= self.parallel or self._stopping:
                return
            if (task.after and task.after not in self.results) or task.busy():
                continue
            if task.complete():  # another process has completed it
                self.results[task.name] = Result(state="complete")
                continue
            attempt = self._attempts[task.name] = self._attempts.get(task.name, 0) + 1
            task.log.parent.mkdir(parents=True, exist_ok=True)
            with task.log.open("ab") as log:
                # In its own session: Ctrl-C in the terminal reaches only this process, which passes it on once.
                process = subprocess.Popen(
                    task.command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=before_exec(),
                )
            self._running.append(_Running(task, process, attempt))
            if self._stopping:  # the signal came while the process was being started
                process.send_signal(signal.SIGTERM)

    def _reap(self) -> None:
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            task = running.task
            if code == 0 and task.complete():
                self.results[task.name] = Result(state="complete")
                self._say(f"{task.name} complete: {task.progress()[1]}")
            elif self._stopping:
                self.results[task.name] = Result(state="stopped", why="the same command resumes it")
            elif code == USER_ERROR or running.attempt > self.retries:
                self.results[task.name] = Result(state="failed", why=_failure_text(task.log, code))
                self._say(f"{task.name} failed: {self.results[task.name].why} (log: {task.log})")
            else:
                self._say(f"{task.name} ended with exit code {code}; attempt {running.attempt + 1} resumes it")

    def _work_done(self) -> float:
        return sum(
            task.work
            * (1.0 if self.results.get(task.name, Result(state="")).state == "complete" else task.progress()[0])
            for task in self.tasks
        )

    def _say(self, line: str) -> None:
        print(f"\r\x1b[K{line}" if self._tty else line, file=sys.stderr, flush=True)

    def _tell(self) -> None:
        """Print one line: how many runs are done, which ones run, and when all will be done."""
        now = time.monotonic()
        if now - self._told < (1.0 if self._tty else 30.0):
            return
        self._told = now
        states = [result.state for result in self.results.values()]
        bad = sum(state in ("failed", "blocked") for state in states)
        shown = []
        for running in self._running:
            share, words = running.task.progress()
            shown.append(f"{running.task.name} {share:.0%} {words}".rstrip())
        if not self._running:
            shown = [f"waiting for another process to end with {task.name}" for task in self._waiting()[:1]]
        done = self._work_done()
        total = sum(
            task.work
            for task in self.tasks
            if self.results.get(task.name, Result(state="complete")).state == "complete"
        )
        rate = (done - self._before) / (now - self._begun) if now > self._begun else 0.0
        left = f"; {clock((total - done) / rate)} left" if rate > 0 and total > done else ""
        failed = f", {bad} failed" if bad else ""
        line = (
            f"{states.count('complete')}/{counted(len(self.tasks), 'run')} complete{failed}: {', '.join(shown)}{left}"
        )
        if self._tty:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\x1b[K{line[: width - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _failure_text(log: Path, code: int) -> str:
    """The error message of a failed command, or else the end of its log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    return f"exit code {code}; its log ends with: " + " | ".join(lines[-SHOWN_LINES:])
