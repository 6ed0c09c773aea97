"""Lets one process at a time make an output: `alone`."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from launchers.local.lock import holder_of, write_holder
from qwen_moe.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; two processes of one output are then not kept from each other
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone(output: Path, advice: str = "") -> Iterator[None]:
    """Lock an output by a file beside it. A second process waits, and then finds the first one's result. With ``advice`` it
    is refused instead: a UserError that names the first process and ends with the advice."""
    output = output.resolve() if output.name in ("", "..") else output  # `.` has no name
    path = output.with_name(output.name + ".lock")
    file = _lock(path, advice)
    # The previous holder deletes the file when it is done, and a lock on a deleted file protects nothing.
    while not _is_named(file, path):
        file.close()
        file = _lock(path, advice)
    try:
        write_holder(file)
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _is_named(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(path: Path, advice: str) -> IO[str]:
    file = path.open("a", encoding="utf-8")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = holder_of(path).text()
        if advice:
            file.close()
            raise UserError(f"{path.with_suffix('')} is being written by {who}: {advice}") from None
        print(f"{who} is preparing this ({path} is locked); waiting for it", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass
    return file
