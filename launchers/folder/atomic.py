"""Atomic writes: a file appears complete or not at all. Every file of a run, its data and its reports is written here."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write atomically: a reader sees either the old content or the new content."""
    write_text(path, json.dumps(value, indent=1) + "\n", private=private)


def write_text(path: Path, text: str, *, private: bool = False, durable: bool = True) -> None:
    """Write atomically; see `replaced`."""
    with replaced(path, private=private, durable=durable) as file:
        file.write(text.encode())


@contextmanager
def replaced(path: Path, *, private: bool = False, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that replaces ``path`` when the block ends without an exception; otherwise ``path`` stays unchanged.

    The file has the permissions that the user's umask gives or, if ``private``, is readable by this user only (0600). If
    not ``durable``, the write does not wait for the disk and may be lost in a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if not private:
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files, but teams share runs
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration):
        current = os.umask(0o077)
        os.umask(current)
        return current
