"""Ensures that no process of a run outlives its parent: the kernel ends a child when its parent dies (Linux)."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
AGENT_PID = "QWEN_MOE_AGENT_PID"  # set by an agent for the processes that it starts


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """From now on the kernel sends signal ``number`` to this process when the process ``parent`` dies. If the parent is
    already dead, this process ends at once. Does nothing on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it died before prctl, so the kernel will not send the signal
        os._exit(128 + int(number))


def before_exec(number: int = signal.SIGTERM) -> Callable[[], None]:
    """For `subprocess.Popen(preexec_fn=...)`: the child ends with this process, even before its program starts."""
    parent = os.getpid()
    return lambda: end_with_parent(parent, number)


def end_with_agent() -> None:
    """Call this first in a process of a run: the process is killed when its agent dies, before or after this call. Without
    its agent it would no longer be covered by the run folder's lock, so it must save nothing."""
    agent = os.environ.pop(AGENT_PID, "")  # processes that this one starts must not see it
    if agent:
        end_with_parent(int(agent), signal.SIGKILL)
