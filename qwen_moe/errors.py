"""The one exception that means: the user can fix this. Its message names the value, what was expected and the fix."""

import errno


class UserError(Exception):
    """Shown by the command line as ``error: MESSAGE`` with exit code 2 and no traceback."""


def explain_os_error(error: OSError) -> str:
    """The message for an error of the operating system that reached the top."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}: free some space, then run the same command again; what was complete before is not harmed"
    return str(error)
