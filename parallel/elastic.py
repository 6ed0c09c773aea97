"""Settings of torch's elastic agent that work in every supported version of torch."""

import os
from typing import Any


def launch_config(*, shutdown_timeout: int, **values: Any) -> Any:
    """Make a `LaunchConfig`. Processes get ``shutdown_timeout`` seconds to end after SIGTERM; torch 2.11 has no such
    option and gives them 30 seconds. The agent makes no folder for logs, which it would leave behind."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    values["logs_specs"] = DefaultLogsSpecs(log_dir=os.devnull)
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        values["shutdown_timeout"] = shutdown_timeout
    return LaunchConfig(**values)


def one_machine(processes: int, *, shutdown_timeout: int, **values: Any) -> Any:
    """`launch_config` for ``processes`` on this machine, which are not restarted."""
    return launch_config(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=shutdown_timeout,
        **values,
    )
