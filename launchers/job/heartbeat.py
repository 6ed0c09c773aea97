"""What one rank tells the agent of its node, through a small file on the node's own disk: alive, step, phase."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launchers.folder.atomic import write_text


class Heartbeat:
    """Written by a rank, read by `launchers.job.node_watch`. Without a path every method does nothing.

    ``phase``: starting, training, saving, finishing, ended. ``beats`` grows with every sign of life, so that a reader
    needs no clock of the writer's.
    """

    def __init__(self, path: Path | None = None, rank: int = 0) -> None:
        self._path = path
        self._state = {"rank": rank, "pid": os.getpid(), "step": -1, "phase": "starting", "beats": 0}
        self._written = 0.0
        self._write()

    def beat(self, step: int) -> None:
        """``step`` optimizer steps are done."""
        changed = self._state["phase"] != "training"
        self._state |= {"step": step, "phase": "training"}
        self._state["beats"] += 1  # type: ignore[operator]
        if changed or time.monotonic() - self._written > 0.1:  # quick steps need not each be a file
            self._write()

    def phase(self, name: str) -> None:
        """Something else than steps begins."""
        self._state["phase"] = name
        self._state["beats"] += 1  # type: ignore[operator]
        self._write()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a checkpoint; the longest one's seconds are kept, for the next launch to plan with."""
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
