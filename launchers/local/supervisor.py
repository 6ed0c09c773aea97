"""Run a worker command under supervision on this machine: restart it after a crash, stop it on Ctrl-C.

The command must resume by itself from what it saved. It reports through three channels: a file ``progress`` in the run
folder, whose text changes whenever durable progress is made; a failure file for non-retryable errors (``{"message": ...,
"kind": ...}``), which should be on another disk; and exit code 2 for a non-retryable error already reported on stderr.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launchers.counted import counted
from launchers.local.lock import RunLock
from launchers.local.orphans import before_exec
from launchers.local.signals import answered_by

PROGRESS = "progress"
USER_ERROR = 2
INTERRUPTED = 130
GRACE_SECONDS = 60.0
LOOK_SECONDS = 1.0  # between looks at whether the run folder is still there


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a supervised run ended. ``message`` (and ``kind``) are set if the worker reported an error."""

    code: int
    restarts: int
    message: str = ""
    kind: str = ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


class Supervisor:
    """Runs ``command`` until it exits 0, fails for good, or crashes too often without progress."""

    def __init__(
        self,
        command: Sequence[str],
        run_dir: Path,
        failure_file: Path,
        environment: Mapping[str, str],
        max_restarts_without_progress: int,
        lock: RunLock | None = None,
    ) -> None:
        self.command, self.run_dir, self.failure_file = list(command), run_dir, failure_file
        self.environment, self.limit = dict(environment), max_restarts_without_progress
        self.lock = lock  # of the run folder: the worker holds it even if this process is killed
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopping and self._process is not None:
            self._process.kill()  # second signal: do not wait for the checkpoint
            return
        self._stopping = True
        if self._process is not None:
            # Whether a step has begun is not known here.
            text = "stopping: a step that has begun is completed and saved (interrupt again to stop at once) ..."
            print(f"\n{text}", file=sys.stderr, flush=True)
            self._process.send_signal(signal.SIGTERM)

    def run(self) -> Outcome:
        """Blocks until the end. The first SIGINT, SIGTERM or SIGHUP is passed on as SIGTERM. A second SIGINT or SIGTERM
        kills the command."""
        with answered_by(self._stop):
            return self._supervise()

    def _supervise(self) -> Outcome:
        restarts = without_progress = 0
        while True:
            self.failure_file.unlink(missing_ok=True)
            before, saved = _read(self.run_dir / PROGRESS), self._last_save()
            # In its own session: Ctrl-C in the terminal reaches only this process, which then asks for a graceful stop.
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                start_new_session=True,
                pass_fds=self.lock.pass_fds if self.lock is not None else (),
                preexec_fn=before_exec(),
            )
            if self._stopping:
                self._process.send_signal(signal.SIGTERM)
            code = self._wait()
            if self.lock is not None and (why := self.lock.lost()):
                return Outcome(code=USER_ERROR, restarts=restarts, message=why, kind="lost folder")
            failure = _read(self.failure_file)
            if failure or code == USER_ERROR:
                told = json.loads(failure) if failure else {"message": ""}
                return Outcome(code=USER_ERROR, restarts=restarts, message=told["message"], kind=told.get("kind", ""))
            if self._stopping:
                if self._last_save() == saved:
                    print(
                        "stopped before a new checkpoint was saved: the same command starts where this one did",
                        file=sys.stderr,
                    )
                return Outcome(code=INTERRUPTED, restarts=restarts)
            if code == 0:
                return Outcome(code=0, restarts=restarts)
            progressed = _read(self.run_dir / PROGRESS) != before
            without_progress = 0 if progressed else without_progress + 1
            if without_progress > self.limit:
                return Outcome(
                    code=1,
                    restarts=restarts,
                    message=f"the run crashed {counted(without_progress, 'time')} in a row without saving progress "
                    f"(last exit code {code}); the output above says where",
                )
            restarts += 1
            print(f"a process of the run died (exit code {code}); restarting from the last checkpoint", file=sys.stderr)

    def _last_save(self) -> int:
        """When the worker last reported progress; the same step may be saved twice."""
        try:
            return (self.run_dir / PROGRESS).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _wait(self) -> int:
        assert self._process is not None
        asked: float | None = None
        looked = time.monotonic()
        while True:
            try:
                return self._process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if self.lock is not None and time.monotonic() - looked > LOOK_SECONDS:
                    looked = time.monotonic()
                    if self.lock.lost():
                        self._process.kill()  # a checkpoint would make the folder anew
                if self._stopping:
                    asked = asked or time.monotonic()
                    if time.monotonic() - asked > GRACE_SECONDS:
                        self._process.kill()
