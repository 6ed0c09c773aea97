"""`python -m qwen_moe.training.elastic NPROC CONFIG FAILURE_FILE`: NPROC workers under one elastic agent.

This is torchrun's agent without its traceback when a worker fails, because the workers have already reported the error. It
shares the run folder's lock with the command that started it, and gets SIGTERM when that command dies (`launchers.local`).
Without a GPU it forks its workers, so that their imports happen once.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from launchers.local.orphans import AGENT_PID
from launchers.local.supervisor import USER_ERROR


def _may_fork() -> bool:
    """Whether workers may be forked. GPU drivers and macOS's system libraries do not survive a fork."""
    import torch

    return sys.platform.startswith("linux") and not torch.cuda.is_available()


def _forked_worker(config: str, failure_file: str) -> int:
    """Run a worker in a process forked from the agent. Returns 0; another exit code ends the process here."""
    from qwen_moe.training import worker

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # drop the agent's handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.NOTSET)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    code = worker.main(Path(config), Path(failure_file))
    if code:
        worker.leave(code)
    return code


def _entry(config: str, failure_file: str) -> tuple[Any, tuple[str, ...], str]:
    """The entry point of a worker, its arguments, and the start method of its process."""
    if not _may_fork():
        return sys.executable, ("-u", "-m", "qwen_moe.training.worker", config, failure_file), "spawn"
    # Import what every worker needs before forking.
    import qwen_moe.runs.attempt
    import qwen_moe.training.loop  # noqa: F401

    return _forked_worker, (config, failure_file), "fork"


def main(nproc: int, config: str, failure_file: str) -> int:
    os.environ[AGENT_PID] = str(os.getpid())
    # Imported only now, so that the parent is watched while torch is imported.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from parallel.elastic import one_machine

    entry, arguments, start_method = _entry(config, failure_file)
    logging.disable(logging.CRITICAL)  # the workers and the supervisor report failures
    # The supervisor restarts: it knows whether there was progress.
    launch = one_machine(nproc, shutdown_timeout=50, start_method=start_method)
    try:
        elastic_launch(launch, entry)(*arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return USER_ERROR if USER_ERROR in codes else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
