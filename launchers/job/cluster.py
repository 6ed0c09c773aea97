"""What the conductor asks of where it runs: Slurm's allocation, or this machine; the same questions to both."""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import IO

from launchers.errors import LaunchError
from launchers.local.orphans import before_exec
from launchers.slurm import commands as slurm


class Here:
    """This machine, without Slurm: one node, nothing to requeue."""

    job = ""
    restarts = 0
    can_requeue = False
    lock_fds: tuple[int, ...] = ()  # the run's lock, for what is started: it is held until the last of them has ended

    def nodes(self) -> list[str]:
        return ["localhost"]

    def address(self, node: str) -> str:
        return "127.0.0.1"

    def port(self, attempt: int) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def switches(self) -> dict[str, str]:
        return {}

    def start(self, command: list[str], output: IO[str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=self.lock_fds,
            preexec_fn=before_exec(),
        )

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """The agent kills its ranks, which have sessions of their own, and ends."""
        process.send_signal(signal.SIGTERM)

    def still_mine(self) -> bool:
        return True

    def facts(self) -> dict[str, str]:
        return {}

    def failed_node(self) -> str:
        return ""

    def requeue(self, excluded: list[str]) -> None:
        raise LaunchError("there is no queue here to requeue into")

    def spare_nodes(self, excluded: list[str]) -> int | None:
        return 0


class SlurmAllocation:
    """The allocation that this process runs in, from Slurm's environment variables."""

    can_requeue = True
    lock_fds: tuple[int, ...] = ()

    def __init__(self, environ: "os._Environ[str] | dict[str, str]") -> None:
        try:
            self.number = int(environ["SLURM_JOB_ID"])
            self._node_list = environ["SLURM_JOB_NODELIST"]
        except (KeyError, ValueError):
            raise LaunchError("this is not a Slurm job (SLURM_JOB_ID is not set): the conductor runs in one") from None
        # In an array, the plain id of a task may mean the whole array to scontrol.
        array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        self.job = f"{array}_{task}" if array and task else str(self.number)
        self.restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
        self.partition = environ.get("SLURM_JOB_PARTITION", "")
        self._names: list[str] = []

    def nodes(self) -> list[str]:
        if not self._names:
            self._names = slurm.hostnames(self._node_list)
        return self._names

    def address(self, node: str) -> str:
        return node

    def port(self, attempt: int) -> int:
        """From the job id, so that two jobs on shared nodes differ; another for each attempt, whose last may linger."""
        return 20000 + (self.number * 7 + attempt) % 10000

    def switches(self) -> dict[str, str]:
        return slurm.topology()

    def start(self, command: list[str], output: IO[str]) -> "subprocess.Popen[bytes]":
        # Without the lock: srun may outlive a conductor that was killed, and would keep the requeued job out for as long.
        # Slurm ends the step with its job, and a job is a singleton by name.
        return subprocess.Popen(command, stdout=output, stderr=output)

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """srun passes SIGTERM on as SIGKILL to every process of the step, stopped ones too, without slurmctld's help."""
        process.send_signal(signal.SIGTERM)

    def facts(self) -> dict[str, str]:
        """scontrol's view of this job; empty while slurmctld does not answer."""
        try:
            return slurm.show_job(self.job)
        except slurm.SlurmError:
            return {}

    def still_mine(self) -> bool:
        """False when Slurm has taken this job elsewhere: a node whose slurmd is gone keeps running what it ran."""
        facts = self.facts()
        if not facts:
            return True
        if facts.get("Restarts", str(self.restarts)) != str(self.restarts):
            return False
        return facts.get("JobState") not in ("PENDING", "REQUEUED", "NODE_FAIL")

    def failed_node(self) -> str:
        """A node of this allocation that Slurm holds for down, or ""."""
        try:
            lines = slurm.run("sinfo", "-h", "-N", "-n", ",".join(self.nodes()), "-o", "%N|%T").splitlines()
        except slurm.SlurmError:
            return ""
        for line in lines:
            node, _, state = line.partition("|")
            if state.startswith(("down", "fail")) or state.endswith("*"):
                return node
        return ""

    def requeue(self, excluded: list[str]) -> None:
        """Requeue this job, without ``excluded`` nodes; Slurm then ends this process.

        The nodes can only be set while the job is pending, which it is from the requeue on; there are some seconds
        (KillWait) before this process is killed. Where that fails, the next attempt sees the nodes and requeues again.
        """
        slurm.requeue(self.job)
        end = time.monotonic() + 20
        while excluded and time.monotonic() < end:
            try:
                slurm.exclude(self.job, excluded)
                return
            except slurm.SlurmError as error:
                print(f"conductor: setting the excluded nodes: {error}", file=sys.stderr, flush=True)
                time.sleep(0.3)

    def spare_nodes(self, excluded: list[str]) -> int | None:
        """Nodes of the partition that are up and not excluded; None when that cannot be told."""
        try:
            (partition,) = slurm.partitions([self.partition] if self.partition else [])
        except LaunchError:
            return None
        return sum(node.usable and node.name not in excluded for node in partition.nodes)


def own_node_name(environ: "os._Environ[str] | dict[str, str]") -> str:
    """The name under which Slurm knows this node; localhost outside of Slurm."""
    return environ.get("SLURMD_NODENAME", "localhost") if "SLURM_JOB_ID" in environ else "localhost"
