"""Runs one command at a time on all nodes of a job: a test of the nodes, or the training."""

import subprocess
from pathlib import Path

from launchers.job.cluster import LocalMachine, SlurmAllocation


class Step:
    """``command`` starts Python on every node; ``stop_seconds`` is how long its processes may take to end."""

    def __init__(self, command: list[str], cluster: LocalMachine | SlurmAllocation, stop_seconds: float) -> None:
        self.command, self.cluster, self.stop_seconds = command, cluster, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, module: str, arguments: list[str], log: Path) -> None:
        """Run a module on every node and append its output to ``log``."""
        with log.open("a", encoding="utf-8") as output:
            self._process = self.cluster.start([*self.command, "-m", module, *arguments], output)

    def poll(self) -> int | None:
        """The exit code; None while the command runs, 0 before the first start."""
        return self._process.poll() if self._process is not None else 0

    def signal(self, number: int) -> None:
        """Send a signal to every process of the step; srun or the agent passes it on."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill at once, without waiting; safe in a signal handler."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Stop every process of the step, within ``stop_seconds``; all are gone when this returns."""
        if self._process is None or self._process.poll() is not None:
            return
        self.cluster.kill(self._process)
        try:
            self._process.wait(timeout=self.stop_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
