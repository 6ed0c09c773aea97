"""Signals by name."""

import signal


def signal_number(name: str) -> int:
    """`USR1` as a number."""
    return int(getattr(signal, f"SIG{name}"))
