"""Decides when a run counts as hung."""

import time
from typing import Any

from launchers.folder.run_folder import Attempt
from launchers.job.evidence import heartbeat_mark, phases


class HangClock:
    """Time since any rank gave a sign of life, on this process's clock. Start-up and the end may take longer."""

    def __init__(self, survive: dict[str, Any]) -> None:
        self._hang, self._startup = float(survive["hang_seconds"]), float(survive["startup_seconds"])
        self._mark: Any = None
        self._since = self._looked = time.monotonic()

    def quiet(self) -> float:
        return time.monotonic() - self._since

    def hung(self, attempt: Attempt) -> bool:
        if time.monotonic() - self._looked < 1:
            return False
        self._looked = time.monotonic()
        mark = heartbeat_mark(attempt)
        if mark != self._mark:
            self._mark, self._since = mark, time.monotonic()
        training = phases(attempt) & {"training", "saving"}
        return self.quiet() > (self._hang if training else self._startup)
