"""Durations as text."""


def clock(seconds: float) -> str:
    """`1:02:03`: hours, minutes and seconds."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
