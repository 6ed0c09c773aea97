"""The exception for errors that the user can fix. Its message names the value, what was expected and the fix."""

import errno
import os


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
