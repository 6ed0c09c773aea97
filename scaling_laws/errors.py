"""The one error of this package."""


class InputError(ValueError):
    """A mistake that the user can fix. The message names the value, what was expected and the fix."""
