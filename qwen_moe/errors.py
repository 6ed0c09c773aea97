"""The exception for errors that the user can fix. Its message names the value, what was expected and the fix."""

import errno
import os
from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Shown by the command line as ``error: MESSAGE`` with exit code 2 and no traceback."""


class PeerLost(UserError):
    """Another process of the run did not come, or ended first. A new attempt may succeed, so the run is not stopped."""


def explain_os_error(error: OSError) -> str:
    """The message for an operating system error that reached the command line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}: free some space, then run the same command again; finished files are not harmed"
    if error.errno == errno.EFBIG:
        return (
            f"{error}: this process may not write larger files: raise the limit (ulimit -f), or use another file system"
        )
    name = getattr(error, "filename2", None) or error.filename  # filename2 is the target of a rename
    if name and isinstance(error, IsADirectoryError):
        return f"{name} is a folder: give a file"
    if name and isinstance(error, NotADirectoryError):
        return f"{name}: a part of this path is a file, not a folder: give another path"
    if name and isinstance(error, FileExistsError):
        if os.path.islink(name) and not os.path.exists(name):
            return f"{name} is a link to {os.readlink(name)}, which does not exist: make it (is its disk mounted?)"
        return f"{name} is a file: give another path" if os.path.isfile(name) else f"{name} exists: give another path"
    if name and isinstance(error, PermissionError):
        return f"{name}: this user may not read or write there: change its permissions, or give another path"
    if name and error.errno == errno.EROFS:
        return f"{name}: this file system is read-only: give another path"
    return str(error)


def explain_failure(error: BaseException) -> str | None:
    """One line for an error that comes from the input or the machine; None for anything else, which is a bug of ours."""
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return (
            f"{error.object[error.start : error.end]!r} cannot be written as {error.encoding}: set PYTHONUTF8=1, or leave "
            "the character out"
        )
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read (--traceback shows where)"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return (
            f"out of memory ({str(error)[:200] or 'no more was given'}): use a smaller model or batch, or more machines"
        )
    return None


# By the type of the mistake. Other messages of pydantic are plain, such as "Input should be greater than 0".
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "text, perhaps in quotation marks",
    "path": "a path (a number in quotation marks)",
    "model": "a section, as in {key: value}",
    "dataclass": "a section, as in {key: value}",
    "mapping": "a section, as in {key: value}",
    "dict": "a section, as in {key: value}",
}
_ENDINGS = ("type", "parsing", "parsing_size", "from_float")
_LISTS = {"tuple_type", "list_type", "set_type", "frozen_set_type"}


def wrong(item: Mapping[str, Any]) -> str:
    """What is wrong with a setting, in words that do not come from Python. ``item``: one of ``ValidationError.errors()``."""
    kind, value = item["type"], item.get("input")
    if kind in _LISTS:
        alone = isinstance(value, str | int | float) and not isinstance(value, bool)
        return f"Input should be a list, as in {f'[{value}]' if alone else '[A, B]'}"
    name, _, ending = kind.partition("_")
    if name in _EXPECTED and ending in _ENDINGS:
        return f"Input should be {_EXPECTED[name]}"
    return str(item["msg"]).removeprefix("Value error, ")


def shown(value: Any) -> str:
    """``value`` as a recipe writes it where Python writes it otherwise, and else as Python does."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
