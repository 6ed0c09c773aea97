"""Checks before submission: finds jobs that Slurm would accept but never start, or would kill every time."""

from collections.abc import Mapping, Sequence

from launchers.counted import counted
from launchers.errors import LaunchError
from launchers.slurm import commands as slurm
from launchers.slurm.commands import Partition, parse_minutes
from launchers.slurm.request import parse_gpus
from launchers.slurm.script import JobSpec


def check_partitions(spec: JobSpec, partitions: Sequence[Partition]) -> tuple[list[str], list[str]]:
    """(problems, notes) of a job on a list of partitions, from which Slurm takes one. If the job can run in some of them,
    there is no problem, and the notes say why it cannot run in the others."""
    everywhere = {node.name for partition in partitions for node in partition.nodes}
    excluded = set(slurm.hostnames(spec.exclude)) if spec.exclude else set()
    where = f"partition {partitions[0].name} does" if len(partitions) == 1 else "these partitions do"
    unknown = [f"--exclude names {node}, which {where} not have" for node in sorted(excluded - everywhere)[:3]]
    each = [_check_partition(spec, partition, excluded) for partition in partitions]
    found = [problem for problems in each for problem in problems]
    if all(each):
        return unknown + found, []
    return unknown, [f"note: the job cannot start in one of its partitions: {problem}" for problem in found]


def _check_partition(spec: JobSpec, partition: Partition, excluded: set[str]) -> list[str]:
    """Problems of a job on a partition; empty if it can run there at some time."""
    problems = []
    name = partition.name
    if partition.state != "UP":
        problems.append(f"partition {name} is {partition.state}, not UP: choose another with --partition")
    names = {node.name for node in partition.nodes}
    left = [node for node in partition.nodes if node.name not in excluded]
    without = f" ({len(excluded & names)} of them excluded)" if excluded & names else ""
    if spec.nodes > len(left):
        problems.append(
            f"--nodes {spec.nodes} is more than partition {name} has: "
            f"{counted(len(partition.nodes), 'node')}{without}; it would "
            "wait forever"
        )
    if partition.max_nodes is not None and spec.nodes > partition.max_nodes:
        problems.append(f"--nodes {spec.nodes} is more than partition {name} allows for one job: {partition.max_nodes}")
    problems += _check_gpus(spec, name, left)
    with_cpus = sum(node.cpus >= spec.cpus_per_task for node in left)
    if spec.cpus_per_task and with_cpus < spec.nodes <= len(left):
        problems.append(
            f"--cpus-per-task {spec.cpus_per_task}: {counted(with_cpus, 'node')} of partition {name} "
            f"{'has' if with_cpus == 1 else 'have'} as many"
        )
    minutes = parse_minutes(spec.time) if spec.time else None
    if spec.time and partition.max_minutes is not None and (minutes is None or minutes > partition.max_minutes):
        asked = "asks for no limit, which is" if minutes is None else "is"
        problems.append(
            f"--time {spec.time} {asked} longer than partition {name} allows: {partition.max_minutes:g} "
            f"{'minute' if partition.max_minutes == 1 else 'minutes'}"
        )
    return problems


def _check_gpus(spec: JobSpec, name: str, left: Sequence[slurm.Node]) -> list[str]:
    if not spec.gpus_per_node or spec.nodes > len(left):
        return []
    text = spec.gpu_request or str(spec.gpus_per_node)
    types = {kind.lower(): count for kind, count in parse_gpus(text).items() if kind}
    fitting = sum(
        node.gpus >= spec.gpus_per_node and all(node.gpu_types.get(k, 0) >= n for k, n in types.items())
        for node in left
    )
    if fitting >= spec.nodes:
        return []
    if types:
        has = ", ".join(sorted({f"{kind or 'no type'}:{n}" for node in left for kind, n in node.gpu_types.items()}))
        has = f"nodes have {has or 'no GPUs'}"
    else:
        has = f"the most is {max(node.gpus for node in left)}"
    have = "has" if fitting == 1 else "have"
    return [f"--gpus-per-node {text}: {counted(fitting, 'node')} of partition {name} {have} as many ({has})"]


def check_account(spec: JobSpec, accounts: Mapping[str, set[str]] | None) -> list[str]:
    """Problems of account and qos. ``accounts`` is None if slurmdbd does not answer."""
    if accounts is None:
        return []
    problems = []
    if spec.account and spec.account not in accounts:
        problems.append(f"--account {spec.account} is not one of yours: {', '.join(sorted(accounts)) or 'none'}")
    allowed = accounts.get(spec.account) if spec.account else set().union(*accounts.values())
    if spec.qos and allowed and spec.qos not in allowed:
        problems.append(f"--qos {spec.qos} is not allowed: {', '.join(sorted(allowed))}")
    return problems


def check_time(spec: JobSpec, checkpoint_seconds: float, measured: bool) -> list[str]:
    """Problems of the time limit and of Slurm's warning time, compared with the time that a checkpoint takes."""
    problems = []
    how = "measured" if measured else "estimated from its size and hardware.checkpoint_gb_per_second"
    if spec.signal_seconds < 1.5 * checkpoint_seconds:
        problems.append(
            f"Slurm warns {spec.signal_seconds} s before the end but a checkpoint takes {checkpoint_seconds:.0f} s ({how}): "
            f"give --signal-seconds {int(3 * checkpoint_seconds) + 30} or more"
        )
    minutes = parse_minutes(spec.time) if spec.time else None
    if minutes is not None and minutes * 60 <= spec.signal_seconds:
        problems.append(
            f"--time {spec.time} is not longer than the {spec.signal_seconds} s before its end when Slurm warns, so nothing "
            "would be trained: raise it, or lower --signal-seconds"
        )
    return problems


def refuse(problems: list[str]) -> None:
    """Raises LaunchError with all problems, if there are any."""
    if problems:
        raise LaunchError("; ".join(problems))


def already_active(job: str, name: str, jobs: list[slurm.Job]) -> slurm.Job | None:
    """The job in the queue with this id (or a task of it), or with this name."""
    for found in jobs:
        if found.state in slurm.ACTIVE and (
            (job and (found.job_id == job or found.job_id.split("_")[0] == job)) or (name and found.name == name)
        ):
            return found
    return None
