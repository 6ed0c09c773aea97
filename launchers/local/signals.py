"""Signals by name, and temporary handlers for SIGINT, SIGTERM and SIGHUP."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from launchers.local.terminal import outlive_terminal

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


def signal_number(name: str) -> int:
    """`USR1` as a number."""
    return int(getattr(signal, f"SIG{name}"))


@contextmanager
def answered_by(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call ``stop`` within the block, and so does SIGHUP, unless it is ignored (nohup). The earlier
    handlers are restored afterwards. A terminal that closes sends SIGHUP more than once, so it never is the second call."""
    asked = False

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if number != _HANGUP or not asked:
            asked = True
            stop(number, frame)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
        numbers.append(_HANGUP)
    outlive_terminal()
    previous = {number: signal.signal(number, answer) for number in numbers}
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
