"""Lets a process end in order after its terminal is gone: `outlive_terminal`."""

import errno
import io
import sys


class _Terminal(io.FileIO):
    """A terminal for writing. What is written after it was closed is lost."""

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(memoryview(data))  # type: ignore[arg-type]


def outlive_terminal() -> None:
    """From now on a lost terminal raises no error when stdout or stderr are written: a progress bar must not end a run
    before it has saved its checkpoint. Streams that are no terminals stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if not stream.isatty() or isinstance(getattr(stream.buffer, "raw", None), _Terminal):
                continue
            raw = _Terminal(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError, ValueError):
            continue  # no stream, or one that is no file
        stream.flush()
        kept = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": True}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **kept))
