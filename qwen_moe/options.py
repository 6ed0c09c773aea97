"""Types of command-line options: numbers must be finite and in range and paths valid; an error is one line.

`Parser` checks plain types for every verb: ``type=int`` takes whole numbers of 64 bits, ``type=float`` takes finite numbers,
and ``type=Path`` refuses an empty path. `whole` and `number` are types with a range.
"""

import argparse
import math
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from qwen_moe.errors import UserError

LARGEST = 2**63 - 1
LARGEST_SEED = 2**32 - 1  # the limit of the numpy generators that megatron-core uses
SHOWN = 60  # characters of a wrong value in a message


def _shown(text: str) -> str:
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text):,} characters)"


def _range(least: float | None, above: float | None, most: float | None) -> str:
    parts = []
    if above is not None:
        parts.append("positive" if above == 0 else f"above {above:g}")
    elif least is not None and least > -LARGEST:
        parts.append(f"{least:,} or more")
    if most is not None and most not in (LARGEST, math.inf):
        parts.append(f"at most {most:,}")
    return f", {' and '.join(parts)}" if parts else ""


def whole(least: int = 0, most: int = LARGEST) -> Callable[[str], int]:
    """An option type: a whole number in a range. It accepts 2e6 and 2_000 too."""

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
    """An option type: a finite number in a range."""

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
    """An option type: a path. An empty path is refused, because it would mean the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{_shown(text)}: expected a path (. for the current folder)")
    return Path(text)


def given_prefix(text: str) -> Path:
    """An option type: a folder and the beginning of file names."""
    path = given_path(text)
    if not path.name:
        raise argparse.ArgumentTypeError(f"{_shown(text)}: expected a folder and the beginning of a name (data/train)")
    return path


class Parser(argparse.ArgumentParser):
    """argparse's parser with one-line UserErrors and checked plain types (see the module's docstring)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, whole(-LARGEST - 1))
        self.register("type", float, number())
        self.register("type", Path, given_path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse reports a verb's unknown option as the whole command's. Here the verb does, and names a similar one."""
        found, rest = super().parse_known_args(args, namespace)
        unknown = [item for item in rest if item.startswith("-")]
        if unknown and not any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            similar = get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            wrong = [item for item in rest if item.startswith("-") or "=" not in item]  # without overrides that follow
            self.error(f"unrecognized arguments: {' '.join(wrong)}{hint}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
