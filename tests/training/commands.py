"""`qwen-moe` commands that tests run to their end. They are forked from a process that has imported what is slow once, which
is most of what a tiny run costs; `test_run` and `test_first_run` also start commands as users do."""

import atexit
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.server import HEAVY, Server


def command(recipe: Path, *overrides: str) -> list[str]:
    """As a user starts it."""
    return [sys.executable, "-m", "qwen_moe", "train", str(recipe), *overrides]


@functools.cache
def _server() -> Server:
    server = Server(HEAVY)
    atexit.register(server.close)
    return server


def run(argv: Sequence[str], seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """`qwen-moe ARGV` in the current folder with the current environment."""
    answer = _server().run(argv, Path.cwd(), seconds, limited=False, **os.environ)
    assert not answer.timed_out, answer.err
    return subprocess.CompletedProcess(list(argv), answer.code, answer.out, answer.err)


def run_to_end(recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`qwen-moe train RECIPE OVERRIDES`."""
    return run(["train", str(recipe), *overrides])
