"""Options of the command line: every number is finite and in range and every path is one, or one line says what is wrong.

`Parser` holds what is true of all of them, so that no verb can forget it: ``type=int`` takes whole numbers of 64 bits,
``type=float`` finite ones and ``type=Path`` no empty path. `whole` and `number` are for those that have a range.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qwen_moe.errors import UserError

LARGEST = 2**63 - 1
LARGEST_SEED = 2**32 - 1  # what numpy's generators of megatron-core take
SHOWN = 60  # characters of a wrong value in a message


def _shown(text: str) -> str:
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text):,} characters)"


def _range(least: float | None, above: float | None, most: float | None) -> str:
    parts = []
    if above is not None:
        parts.append("positive" if above == 0 else f"above {above:g}")
    elif least is not None:
        parts.append(f"{least:,} or more")
    if most is not None and most not in (LARGEST, math.inf):
        parts.append(f"at most {most:,}")
    return f", {' and '.join(parts)}" if parts else ""


def whole(least: int = 0, most: int = LARGEST) -> Callable[[str], int]:
    """The type of an option that is a whole number in a range; 2e6 and 2_000 are whole numbers too."""

    def convert(text: str) -> int:
        try:
            value = float(text) if len(text) <= SHOWN else math.nan
            found = int(value) if "e" in text.lower() and value.is_integer() else int(text)
        except (ValueError, OverflowError):
            found = None
        if found is None or not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{_shown(text)}: expected a whole number{_range(least, None, most)}")
        return found

    return convert


def number(
    *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Callable[[str], float]:
    """The type of an option that is a finite number in a range."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if (
            not math.isfinite(value)
            or (least is not None and value < least)
            or (above is not None and value <= above)
            or (most is not None and value > most)
        ):
            raise argparse.ArgumentTypeError(f"{_shown(text)}: expected a number{_range(least, above, most)}")
        return value

    return convert


def given_path(text: str) -> Path:
    """The type of options that are paths: an empty one would be the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{_shown(text)}: expected a path (. for the current folder)")
    return Path(text)


def given_prefix(text: str) -> Path:
    """The type of options that are the beginning of files' names."""
    path = given_path(text)
    if not path.name:
        raise argparse.ArgumentTypeError(f"{_shown(text)}: expected a folder and the beginning of a name (data/train)")
    return path


class Parser(argparse.ArgumentParser):
    """argparse's, whose mistakes are UserErrors of one line and whose plain types are checked (see above)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, whole(-LARGEST - 1))
        self.register("type", float, number())
        self.register("type", Path, given_path)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
