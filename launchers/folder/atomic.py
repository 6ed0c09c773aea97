"""Files that appear whole or not at all. Every file of a run, its data and its reports is written here."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write atomically: a reader sees the old content or the new, never half of it."""
    write_text(path, json.dumps(value, indent=1) + "\n", private=private)


def write_text(path: Path, text: str, *, private: bool = False, durable: bool = True) -> None:
    """Write atomically, see `replaced`."""
    with replaced(path, private=private, durable=durable) as file:
        file.write(text.encode())


@contextmanager
def replaced(path: Path, *, private: bool = False, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of ``path`` when the block ends well; else ``path`` stays as it is.

    It has the permissions that the user's umask gives; ``private``: for this user alone (0600). Not ``durable``: it may be
    lost with the machine's power, and nobody waits for the disk.
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
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes them private, which a team's shared run is not
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
