"""A progress bar on stderr for work that may take more than a second."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def bar(items: Iterable[Item], what: str, unit: str = "", total: int | None = None) -> Iterable[Item]:
    """Iterate over ``items`` with a bar on stderr that appears after a second. A log gets a line every ten seconds."""
    from tqdm import tqdm

    often = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        file=sys.stderr,
        leave=False,
        delay=1.0,
        mininterval=often,
        miniters=1,  # else slow items after many fast ones would not show
        unit_scale=True,
    )


def counter(total: int, left: int) -> Any:
    """A tqdm bar of ``total`` queries, of which ``left`` are to do. The bars of the answers to some of them are below it."""
    from tqdm import tqdm

    return tqdm(
        desc="queries",
        unit="query",
        total=total,
        initial=total - left,
        file=sys.stderr,
        leave=False,
        delay=1.0,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        miniters=1,
    )
