"""A rank's heartbeat: a small file on the node's own disk that tells the node's agent the step and the phase."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launchers.folder.atomic import write_text


class Heartbeat:
    """Written by a rank, read by `launchers.job.node_watch`. Without a path every method does nothing.

    ``phase`` is starting, training, saving, finishing or ended. ``beats`` grows with every sign of life, so readers do not
    depend on the writer's clock.
    """

    def __init__(self, path: Path | None = None, rank: int = 0) -> None:
        self._path = path
        self._state = {"rank": rank, "pid": os.getpid(), "step": -1, "phase": "starting", "beats": 0}
        self._written = 0.0
        self._write()

    def beat(self, step: int) -> None:
        """Record that ``step`` optimizer steps are done."""
        changed = self._state["phase"] != "training"
        self._state |= {"step": step, "phase": "training"}
        self._state["beats"] += 1  # type: ignore[operator]
        if changed or time.monotonic() - self._written > 0.1:  # quick steps do not each write the file
            self._write()

    def phase(self, name: str) -> None:
        """Record that another phase begins."""
        self._state["phase"] = name
        self._state["beats"] += 1  # type: ignore[operator]
        self._write()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Use around a checkpoint. Keeps the longest duration in seconds, for the next launch's time check."""
        before, start = str(self._state["phase"]), time.monotonic()
        self.phase("saving")
        yield
        taken = time.monotonic() - start
        self._state["checkpoint_seconds"] = max(taken, float(self._state.get("checkpoint_seconds", 0)))  # type: ignore[arg-type]
        self.phase(before)

    def _write(self) -> None:
        if self._path is None:
            return
        write_text(self._path, json.dumps(self._state), durable=False)  # a step must not wait for a busy disk
        self._written = time.monotonic()
