"""A file of JSON lines that grows while one process works: locked, and whole lines only."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from launchers.local.lock import users_of
from qwen_moe.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; two processes of one file are then not noticed
    fcntl = None  # type: ignore[assignment]


class LineFile:
    """``path``, open for appending, and locked until it is closed. ``whole(path)``: the bytes of its whole lines; what
    follows was cut off by a kill and is removed. Raises UserError, with ``advice``, if another process has the file."""

    def __init__(self, path: Path, whole: Callable[[Path], int], advice: str) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{path} is being written by {users_of(path)}: {advice}") from None
                except OSError:  # a file system without locks
                    pass
            os.ftruncate(self.descriptor, whole(path))
        except BaseException:
            os.close(self.descriptor)
            raise

    def append(self, record: dict[str, Any]) -> None:
        """One line, on the disk when this returns."""
        self.append_all([record])

    def append_all(self, records: Iterable[dict[str, Any]]) -> None:
        """A line for each, all on the disk when this returns."""
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        while lines:
            lines = lines[os.write(self.descriptor, lines) :]
        os.fsync(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)
