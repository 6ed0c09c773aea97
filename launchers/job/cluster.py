"""Where the conductor runs: a Slurm allocation or this machine, behind the same interface."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from launchers.errors import LaunchError
from launchers.folder.logs import read_tail
from launchers.local.orphans import before_exec
from launchers.slurm import commands as slurm

_SCANCELLED = re.compile(r"\*\*\* JOB (\d+) ON \S+ CANCELLED AT (\S+) \*\*\*")


def scancelled(facts: Mapping[str, str]) -> bool:
    """Whether scancel is ending the job that scontrol's ``facts`` describe. Until its processes have ended, scontrol shows
    only COMPLETING. slurmstepd's line in the job's log tells: after a time limit, a preemption or a requeue it goes on with
    `DUE TO ...`."""
    if facts.get("JobState") == "CANCELLED":
        return True
    if facts.get("JobState") != "COMPLETING" or not facts.get("StdOut"):
        return False
    found = _SCANCELLED.findall(read_tail(Path(facts["StdOut"]), 1000))
    # An earlier start of the job has the same log; times of this form sort as text.
    return any(job == facts.get("JobId") and when >= facts.get("StartTime", "") for job, when in found)


class LocalMachine:
    """This machine, without Slurm: one node, nothing to requeue."""

    job = ""
    restarts = 0
    can_requeue = False
    lock_fds: tuple[int, ...] = ()  # the run's lock; processes started here hold it until the last of them has ended

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
        """Stop the agent, which first kills its ranks; they run in their own sessions."""
        process.send_signal(signal.SIGTERM)

    def still_mine(self) -> bool:
        return True

    def facts(self) -> dict[str, str]:
        return {}

    def failed_node(self) -> str:
        return ""

    def requeue(self, excluded: list[str]) -> None:
        raise LaunchError("this run is not a Slurm job: there is no queue to requeue it into")

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
            raise LaunchError(
                "this is not a Slurm job (SLURM_JOB_ID is not set): run the conductor inside a job, or with --local"
            ) from None
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
        """A port from the job id, so that jobs on shared nodes differ. Each attempt gets a new one, because the port of the
        last attempt may still be in use."""
        return 20000 + (self.number * 7 + attempt) % 10000

    def switches(self) -> dict[str, str]:
        return slurm.topology()

    def start(self, command: list[str], output: IO[str]) -> "subprocess.Popen[bytes]":
        # srun does not get the lock: it may outlive a killed conductor and would then block the requeued job.
        # Slurm ends the step with its job, and a job is a singleton by name.
        return subprocess.Popen(command, stdout=output, stderr=output)

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """srun sends SIGKILL for it to every process of the step, even stopped ones, without slurmctld's help."""
        process.send_signal(signal.SIGTERM)

    def facts(self) -> dict[str, str]:
        """scontrol's view of this job; empty while slurmctld does not answer."""
        try:
            return slurm.show_job(self.job)
        except slurm.SlurmError:
            return {}

    def still_mine(self) -> bool:
        """False if Slurm has started this job elsewhere: a node whose slurmd is gone keeps running its processes."""
        facts = self.facts()
        if not facts:
            return True
        if facts.get("Restarts", str(self.restarts)) != str(self.restarts):
            return False
        return facts.get("JobState") not in ("PENDING", "REQUEUED", "NODE_FAIL")

    def failed_node(self) -> str:
        """A node of this allocation that Slurm considers down, or ""."""
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
        """Requeue this job without ``excluded`` nodes; Slurm then ends this process.

        The nodes can only be set while the job is pending, which it is after the requeue; some seconds (KillWait) remain
        before this process is killed. If setting them fails, the next attempt sees the nodes and requeues again.
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
        """Number of nodes of the partition that are up and not excluded; None if it is not known."""
        try:
            (partition,) = slurm.partitions([self.partition] if self.partition else [])
        except LaunchError:
            return None
        return sum(node.usable and node.name not in excluded for node in partition.nodes)


def own_node_name(environ: "os._Environ[str] | dict[str, str]") -> str:
    """Slurm's name of this node; localhost outside Slurm."""
    return environ.get("SLURMD_NODENAME", "localhost") if "SLURM_JOB_ID" in environ else "localhost"
