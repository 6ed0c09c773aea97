"""Signals by name, and temporary handlers for SIGINT and SIGTERM."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def signal_number(name: str) -> int:
    """`USR1` as a number."""
    return int(getattr(signal, f"SIG{name}"))


@contextmanager
def answered_by(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call ``stop`` within the block; the earlier handlers are restored afterwards."""
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
