"""No process of a run outlives what started it: the kernel ends a child when its parent dies (Linux)."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
AGENT_PID = "QWEN_MOE_AGENT_PID"  # set by an agent for the processes that it starts


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """From now on the kernel sends signal ``number`` here when the process ``parent`` dies; where it is dead already, this
    process ends at once. Does nothing on other systems than Linux."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it died before the kernel was asked, and its death will not be told
        os._exit(128 + int(number))


def before_exec(number: int = signal.SIGTERM) -> Callable[[], None]:
    """For `subprocess.Popen(preexec_fn=...)`: the child ends with this process, from before its program's first line on."""
    parent = os.getpid()
    return lambda: end_with_parent(parent, number)


def end_with_agent() -> None:
    """In a process of a run, first of all: it is killed when its agent dies, before or after this call. What it does then
    is no longer under the run folder's lock, so it saves nothing."""
    agent = os.environ.pop(AGENT_PID, "")  # not for what this process starts
    if agent:
        end_with_parent(int(agent), signal.SIGKILL)
