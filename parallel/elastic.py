"""torch's elastic agent, in the versions that are supported."""

from typing import Any


def launch_config(*, shutdown_timeout: int, **values: Any) -> Any:
    """A `LaunchConfig`. ``shutdown_timeout``: seconds that processes have to end after SIGTERM; torch 2.11 has no such
    option and gives them 30."""
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        values["shutdown_timeout"] = shutdown_timeout
    return LaunchConfig(**values)
