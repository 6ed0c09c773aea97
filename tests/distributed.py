"""`run_distributed(fn, world_size, *args)`: call ``fn(*args)`` in real gloo processes and return every rank's result."""

import warnings
from collections.abc import Callable
from typing import Any

from parallel.local_group import RankFailed, preload, run_local

# What modules of tests import, so that no rank does: transformers alone takes a second.
TRANSFORMERS = "transformers.models.qwen2_moe.modeling_qwen2_moe"
preload(["parallel.pipeline", "qwen_moe.verify.ranks", "hypothesis", "pytest", TRANSFORMERS])

# torch 2.13's gloo corrupts the heap about once in thousands of short runs (seen with torch's collectives alone, several
# groups and asynchronous ones, and in its thread `pt_gloo_runloop`). Nothing that a test asserts ends in this way. Not
# SIGABRT: gloo aborts where ranks send what others do not expect, and that may be our mistake, now and then.
CRASH = "(SIGSEGV)"


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Results by rank; fails with the traceback of the first rank that failed. ``fn`` must be importable. After a
    segmentation fault it is run once more, with a warning: what crashes for a reason does so twice."""
    try:
        return run_local(fn, world_size, *args, timeout=timeout)
    except RankFailed as error:
        if not error.cause.endswith(CRASH):
            raise
        warnings.warn(f"{fn.__name__} is run once more: {error.cause}", stacklevel=2)
    return run_local(fn, world_size, *args, timeout=timeout)
