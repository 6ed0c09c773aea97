"""Settings of torch's elastic agent that work in every supported version of torch."""

from typing import Any


def launch_config(*, shutdown_timeout: int, **values: Any) -> Any:
    """Make a `LaunchConfig`. Processes get ``shutdown_timeout`` seconds to end after SIGTERM; torch 2.11 has no such
    option and gives them 30 seconds."""
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        values["shutdown_timeout"] = shutdown_timeout
    return LaunchConfig(**values)
