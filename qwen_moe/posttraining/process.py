"""Runs a command of `qwen-moe` in a process of its own, so that nothing of a model stays behind in this one."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from launchers.local.orphans import before_exec
from launchers.local.signals import answered_by
from launchers.local.supervisor import INTERRUPTED
from qwen_moe.workflow.state import Stopped

COMMAND = (sys.executable, "-m", "qwen_moe")


def run_command(arguments: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()) -> str:
    """The stdout of `qwen-moe ARGUMENTS`, whose stderr is this process's, with variables beside this process's. Raises
    Stopped unless it succeeds.

    The first SIGINT, SIGTERM or SIGHUP is passed on as SIGINT, on which a training run saves a checkpoint; the second kills.
    If this process dies, the command gets SIGTERM (Linux); until it has ended it holds the lock whose file is in
    ``pass_fds``.
    """
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        process.send_signal(signal.SIGKILL if stopping else signal.SIGINT)
        stopping = True

    # In its own session: Ctrl-C in the terminal reaches only this process, which passes it on once.
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=os.environ | dict(environment),
        text=True,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=before_exec(),
        pass_fds=tuple(pass_fds),
    )
    with answered_by(stop):
        output, _ = process.communicate()
    if stopping:
        raise Stopped(INTERRUPTED)
    if process.returncode:
        raise Stopped(process.returncode if process.returncode > 0 else 128 - process.returncode)
    return output
