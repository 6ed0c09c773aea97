"""`python -m qwen_moe.training.elastic NPROC CONFIG FAILURE_FILE`: NPROC workers under one elastic agent.

The same agent as the `torchrun` command, without its traceback when a worker fails: the workers have said what is wrong.
It holds the run folder's lock with the command that started it, and gets SIGTERM when that one dies (`launchers.local`).
"""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launchers.local import USER_ERROR
from launchers.orphans import AGENT_PID


def main(nproc: int, config: str, failure_file: str) -> int:
    os.environ[AGENT_PID] = str(os.getpid())
    logging.disable(logging.CRITICAL)  # what failed is told by the workers and by the supervisor
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # the supervisor restarts: it knows whether there was progress
        shutdown_timeout=50,
    )
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "qwen_moe.training.worker", config, failure_file)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return USER_ERROR if USER_ERROR in codes else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
