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


@contextmanager
def interrupts_kept_from_children() -> Iterator[None]:
    """Processes that are started within the block have SIGINT blocked. Ctrl-C reaches all processes of a terminal, and one
    that still starts Python would end with a traceback before it can ignore it. This process gets it after the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
