"""Slurm's commands: read the queue and the partitions, submit, requeue, cancel. Uses only text formats, which are stable."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launchers.errors import LaunchError

ACTIVE = {
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "STOPPED",
}
_USABLE = {"idle", "mixed", "allocated", "completing", "reserved", "planned"}
ASK_SECONDS = 10  # timeout of queries that a person waits for
_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|connect failure|Connection (?:refused|timed out|reset)|"
    r"communication connection failure|Zero Bytes were transmitted|No route to host",
    re.IGNORECASE,
)
_NO_CLUSTER = re.compile(r"Could not establish a configuration source")
_DEFAULTS_OF_QUESTIONS = ("SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_")
_KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_UMASK", "SLURM_TIME_FORMAT"}
_GPUS = ("GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK")
_VARIABLES = {  # option of a script -> the SBATCH_... that would override it, if its name differs or there are several
    "time": ("TIMELIMIT",),
    "array": ("ARRAY_INX",),
    "output": ("OUTPUT", "ERROR"),
    "requeue": ("REQUEUE", "NO_REQUEUE"),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "gres": _GPUS,
    "gpus-per-node": _GPUS,
    "switches": ("REQ_SWITCH", "WAIT4SWITCH"),
}
_DAYS = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class SlurmError(LaunchError):
    """A Slurm command failed; the message is the command's own."""


class NoAnswer(SlurmError):
    """Slurm's commands are installed, but its controller does not answer."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"Slurm does not answer ({why}): try again later; `scontrol ping` says whether slurmctld is up"
        )
        self.short = f"Slurm does not answer ({why})"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node as shown by sinfo."""

    name: str
    state: str
    cpus: int
    gpus: int
    gpu_types: Mapping[str, int] = field(default_factory=dict)  # type in lower case -> GPUs

    @property
    def usable(self) -> bool:
        return self.state in _USABLE


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition and its nodes; ``max_minutes`` and ``max_nodes`` are None when unlimited."""

    name: str
    state: str
    max_minutes: float | None
    max_nodes: int | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One line of squeue. ``job_id`` is `123`, or `123_4` for a task of an array."""

    job_id: str
    name: str
    state: str
    reason: str
    elapsed: str
    left: str
    nodes: str


def asking_environment() -> dict[str, str]:
    """The environment without the defaults of query commands: variables such as SQUEUE_STATES would hide jobs."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_DEFAULTS_OF_QUESTIONS)}


def submitting_environment(script: str) -> dict[str, str]:
    """sbatch's environment for a script. It leaves out SBATCH_X where the script sets `#SBATCH --x`, because sbatch prefers
    the variable. It also leaves out srun's variables and those of a surrounding allocation, which would reach the job."""
    options = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    dropped = {f"SBATCH_{name}" for name in ("WAIT", "ARRAY_INX", "NO_REQUEUE", "TEST_ONLY")}
    for option in options:
        dropped.update(f"SBATCH_{name}" for name in _VARIABLES.get(option, (option.upper().replace("-", "_"),)))
    return {
        name: value
        for name, value in asking_environment().items()
        if name not in dropped and not name.startswith("SRUN_") and (not name.startswith("SLURM_") or name in _KEPT)
    }


def run(
    *command: str, timeout: float = 60, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """stdout of a Slurm command. Raises SlurmError with the command's message if it fails or is not installed, and NoAnswer
    if the controller does not answer or ``timeout`` seconds have passed."""
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"there is no Slurm here ({command[0]} is not on PATH): run this on a login node of the cluster, or use "
            "`qwen-moe launch --local`"
        )
    pipe = subprocess.PIPE
    # In its own session: sites wrap these commands in scripts, whose children would keep the pipes open.
    with subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=cwd,
        env=asking_environment() if environment is None else environment,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, said = process.communicate(timeout=timeout)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise NoAnswer(f"{command[0]} gave no answer within {timeout:g} s") from None
            raise
    if process.returncode:
        if _AWAY.search(said):
            raise NoAnswer(f"{command[0]}: {said.strip().splitlines()[-1].rpartition('error: ')[2]}")
        if _NO_CLUSTER.search(said):
            raise SlurmError(
                f"{command[0]} is installed here, but finds no configuration of a cluster "
                f"({said.strip().splitlines()[-1].rpartition(': ')[2]}): run this on a login node of the cluster, set "
                "SLURM_CONF, or use `qwen-moe launch --local`"
            )
        said = said.strip() or f"exit code {process.returncode}"
        raise SlurmError(said if said.startswith(f"{command[0]}: ") else f"{command[0]}: {said}")
    return out


def parse_minutes(text: str) -> float | None:
    """Slurm's time (`30`, `30:00`, `24:00:00`, `2-12`, `2-12:30:00`) in minutes; None for UNLIMITED. Raises LaunchError."""
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE", "0"):
        return None
    match = _DAYS.fullmatch(text.strip())
    if not match or len(text) > 32:
        raise LaunchError(f"time {text!r} is not a Slurm time: use minutes, HH:MM:SS, or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = (numbers + [0, 0])[:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60
    if len(numbers) == 1:
        return float(numbers[0])
    if len(numbers) == 2:
        return numbers[0] + numbers[1] / 60
    return numbers[0] * 60 + numbers[1] + numbers[2] / 60


def fields(line: str) -> dict[str, str]:
    """`Key=Value` pairs of one line of `scontrol -o`; a value may contain blanks and ends at the next key."""
    parts = re.split(r"(?:^|\s)([A-Za-z][A-Za-z0-9_/:]*)=", line.strip())
    return {key: value.strip() for key, value in zip(parts[1::2], parts[2::2])}


def gpus_of(gres: str) -> int:
    """Number of GPUs in a gres text such as `gpu:8`, `gpu:h100:8(S:0-1)` or `gpu:a:2,gpu:b:2`."""
    return sum(gpu_types(gres).values())


def gpu_types(gres: str) -> dict[str, int]:
    """Number of GPUs in a gres text by type, in lower case; "" for GPUs without a type."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):  # the brackets hold sockets
        # The count is the last part; a type may begin with a digit (`gpu:1g.10gb:7`, `gpu:1080ti:4`).
        name, *rest = entry.strip().split(":")
        if name == "gpu" and len(rest) in (1, 2) and rest[-1].isdecimal():
            kind = rest[0].lower() if len(rest) == 2 else ""
            found[kind] = found.get(kind, 0) + int(rest[-1])
    return found


def _limit(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def partitions(names: Sequence[str]) -> list[Partition]:
    """The partitions ``names``, or the default one if there are none. Raises LaunchError, which names the existing ones."""
    lines = run("scontrol", "show", "partition", "-o").splitlines()
    everything = {p["PartitionName"]: p for p in map(fields, lines) if "PartitionName" in p}
    known = ", ".join(everything) or "none"
    missing = [name for name in names if name not in everything]
    if missing:
        shown = " and ".join(map(repr, missing))
        what = f"partition {shown} does not exist" if len(missing) == 1 else f"partitions {shown} do not exist"
        raise LaunchError(f"{what}: give --partition with one (or several, with commas) of {known}")
    chosen = names or [name for name, facts in everything.items() if facts.get("Default") == "YES"]
    if not chosen:
        raise LaunchError(f"this cluster has no default partition: give --partition with one of {known}")
    return [_with_nodes(everything[name]) for name in chosen]


def _with_nodes(facts: Mapping[str, str]) -> Partition:
    nodes = []
    for line in run("sinfo", "-h", "-N", "-p", facts["PartitionName"], "-o", "%N|%T|%c|%G").splitlines():
        host, state, cpus, gres = line.split("|", 3)
        # A trailing mark means not responding, powering or in maintenance. Only a bare state is usable.
        types = gpu_types(gres)
        node = Node(name=host, state=state.strip(), cpus=int(cpus.rstrip("+")), gpus=gpus_of(gres), gpu_types=types)
        nodes.append(node)
    return Partition(
        name=facts["PartitionName"],
        state=facts.get("State", "UP"),
        max_minutes=parse_minutes(facts.get("MaxTime", "UNLIMITED")),
        max_nodes=_limit(facts.get("MaxNodes", "UNLIMITED")),
        nodes=tuple(nodes),
    )


def hostnames(node_list: str) -> list[str]:
    """Expand `node[1-3]` into names."""
    return run("scontrol", "show", "hostnames", node_list).split() if node_list else []


def queue(timeout: float = 60) -> list[Job]:
    """This user's jobs in the queue, array tasks one by one."""
    form = "%i|%T|%M|%L|%N|%r|%j"
    found = []
    for line in run("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", form, timeout=timeout).splitlines():
        job_id, state, elapsed, left, nodes, reason, name = line.split("|", 6)
        found.append(Job(job_id=job_id, name=name, state=state, reason=reason, elapsed=elapsed, left=left, nodes=nodes))
    return found


def show_job(job_id: str) -> dict[str, str]:
    """scontrol's facts about a job; empty if Slurm has forgotten it (MinJobAge)."""
    try:
        lines = run("scontrol", "show", "job", "-o", job_id, timeout=ASK_SECONDS).splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return fields(lines[0]) if lines else {}


def accounts() -> dict[str, set[str]] | None:
    """Accounts of this user and the qos that each may use, from slurmdbd; None if there is no slurmdbd."""
    command = ("sacctmgr", "-n", "-P", "show", "associations", f"user={getpass.getuser()}", "format=account,qos")
    try:
        lines = run(*command, timeout=15).splitlines()
    except SlurmError:
        return None
    found: dict[str, set[str]] = {}
    for line in lines:
        account, _, qos = line.partition("|")
        found.setdefault(account, set()).update(filter(None, qos.split(",")))
    return found or None


def submit(script: Path) -> str:
    """Submit from the script's folder, where its log goes. Returns the job id."""
    environment = submitting_environment(script.read_text(encoding="utf-8"))
    answer = run("sbatch", "--parsable", script.name, cwd=script.parent, environment=environment)
    return answer.strip().splitlines()[-1].split(";")[0]


def cancel(job_id: str) -> None:
    run("scancel", job_id, timeout=ASK_SECONDS)


def requeue(job_id: str, patience: float = 600) -> None:
    """Requeue a job; retries while slurmctld is being restarted. Raises SlurmError after ``patience`` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            run("scontrol", "requeue", job_id)
            return
        except SlurmError as error:
            if time.monotonic() > end or "Invalid job id" in str(error):
                raise
        time.sleep(3)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Set the nodes that a pending job must not get."""
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def topology() -> dict[str, str]:
    """Leaf switch of each node if the cluster has a topology/tree; empty otherwise."""
    try:
        lines = run("scontrol", "show", "topology").splitlines()
    except SlurmError:
        return {}
    found = {}
    for line in lines:
        facts = fields(line)
        if facts.get("Level") == "0" and facts.get("SwitchName") and facts.get("Nodes"):
            for node in hostnames(facts["Nodes"]):
                found[node] = facts["SwitchName"]
    return found
