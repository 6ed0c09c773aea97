"""Numbers of things as text."""

import re

_PLURAL = re.compile(r"^([a-z]+ )?(answer|document|file|line|pair|row|test)s\b")


def counted(count: float, one: str, many: str = "") -> str:
    """``count`` and what is counted: `1 query`, `0 queries`, `2,000 runs`. ``many``: the plural of ``one``, unless s, es or
    ies make it. Both may go on, as in `counted(n, "run is", "runs are")`."""
    number = f"{int(count):,}" if count == int(count) else f"{count:,g}"
    return f"{number} {one if count == 1 else many or _plural(one)}"


def tallied(count: int, reason: str) -> str:
    """``count`` with what it is of, such as `1 row without text` for the reason "rows without text"."""
    return counted(count, _PLURAL.sub(r"\1\2", reason), reason)


def _plural(one: str) -> str:
    if one.endswith("y") and one[-2:-1] not in "aeiou":
        return f"{one[:-1]}ies"
    return f"{one}es" if one.endswith(("s", "x", "sh", "nch", "rch", "tch")) else f"{one}s"
