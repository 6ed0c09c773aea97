"""`run_distributed(fn, world_size, *args)`: call ``fn(*args)`` in real gloo processes and return every rank's result."""

from collections.abc import Callable
from typing import Any

from parallel.local_group import preload, run_local

preload(["parallel.pipeline", "qwen_moe.verify.ranks", "hypothesis", "pytest"])


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Results by rank; fails with the traceback of the first rank that failed. ``fn`` must be importable."""
    return run_local(fn, world_size, *args, timeout=timeout)
