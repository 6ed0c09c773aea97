"""One command on all nodes of a job at a time: a test of the nodes, or the training; started, asked and stopped."""

import subprocess
from pathlib import Path

from launchers.job.cluster import Here, SlurmAllocation


class Step:
    """``command`` starts a Python on every node; ``stop_seconds`` is how long its processes may take to end."""

    def __init__(self, command: list[str], cluster: Here | SlurmAllocation, stop_seconds: float) -> None:
        self.command, self.cluster, self.stop_seconds = command, cluster, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, module: str, arguments: list[str], log: Path) -> None:
        """Run a module on every node. Its output is added to ``log``."""
        with log.open("a", encoding="utf-8") as output:
            self._process = self.cluster.start([*self.command, "-m", module, *arguments], output)

    def poll(self) -> int | None:
        """The exit code; None while it runs, 0 before the first start."""
        return self._process.poll() if self._process is not None else 0

    def signal(self, number: int) -> None:
        """To every process of the step, which srun or the agent passes it on to."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """At once, without waiting. From a signal handler."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Every process of the step is gone when this returns, within ``stop_seconds``."""
        if self._process is None or self._process.poll() is not None:
            return
        self.cluster.kill(self._process)
        try:
            self._process.wait(timeout=self.stop_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
