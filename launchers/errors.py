"""The error of this package that a user can fix."""


class LaunchError(ValueError):
    """The run cannot be started here; the message says why and what to do."""
