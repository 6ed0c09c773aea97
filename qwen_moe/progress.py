"""Progress bars on stderr, for work that may take more than a second."""

import contextlib
import os
import sys
from collections.abc import Iterable, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")

_UNKNOWN = {"ncols": 80, "nrows": 20}  # a terminal that does not say how large it is


def style(log_seconds: float = 10.0) -> dict[str, Any]:
    """Settings of all tqdm bars: a terminal is redrawn often, and a log gets a line every ``log_seconds``.

    tqdm draws nothing on a terminal of 0 rows, which `script` and some containers give."""
    terminal = sys.stderr.isatty()
    often = 0.2 if terminal else log_seconds
    # miniters: else slow items after many fast ones would not show.
    settings = {"file": sys.stderr, "mininterval": often, "maxinterval": max(often, 10.0), "miniters": 1}
    if terminal:
        with contextlib.suppress(OSError, ValueError):
            settings |= {"dynamic_ncols": True} if all(os.get_terminal_size(sys.stderr.fileno())) else _UNKNOWN
    return settings


def bar(items: Iterable[Item], what: str, unit: str = "", total: int | None = None) -> Iterable[Item]:
    """Iterate over ``items`` with a bar that appears after a second."""
    from tqdm import tqdm

    if total is None and isinstance(items, Sized):
        total = len(items)
    scaled = total is None or total >= 10_000  # else 3 of 4 would be 3.00/4.00
    return tqdm(items, desc=what, unit=unit, total=total, leave=False, delay=1.0, unit_scale=scaled, **style())


def counter(total: int, left: int) -> Any:
    """A tqdm bar of ``total`` queries, of which ``left`` are to do. The bars of the answers to some of them are below it."""
    from tqdm import tqdm

    return tqdm(desc="queries", unit="query", total=total, initial=total - left, leave=False, delay=1.0, **style())
