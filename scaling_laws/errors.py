"""The one error of this package."""


class InputError(ValueError):
    """Something a user can mend; the message names the value, what was expected and the fix."""
