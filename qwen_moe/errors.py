"""The one exception that means: the user can fix this. Its message names the value, what was expected and the fix."""


class UserError(Exception):
    """Shown by the command line as ``error: MESSAGE`` with exit code 2 and no traceback."""
