"""The message about a section of config.json that has a wrong value."""

from pydantic import ValidationError

from qwen_moe.errors import UserError, wrong


def section_error(error: ValidationError, where: str, key: str, ending: str = "") -> UserError:
    """Of the first problem in section ``key`` of the file ``where``: its place, its value if it has one, and the mistake."""
    first = error.errors()[0]
    shown = f" is {first['input']!r:.60}" if first["loc"] and first["type"] != "missing" else ""
    place = ".".join([key, *map(str, first["loc"])]) + shown
    return UserError(f"{where}: {place}: {wrong(first)}{ending}")
