"""Refusing a job before it is submitted: what the queue would accept and then let wait, or kill, for ever."""

from collections.abc import Mapping

from launchers import slurm
from launchers.local import LaunchError
from launchers.script import JobSpec
from launchers.slurm import Partition, parse_minutes


def check_partition(spec: JobSpec, partition: Partition) -> list[str]:
    """Problems of a job on a partition; empty when it can run there some day."""
    problems = []
    name = partition.name
    if partition.state != "UP":
        problems.append(f"partition {name} is {partition.state}, not UP: choose another with --partition")
    names = {node.name for node in partition.nodes}
    excluded = set(slurm.hostnames(spec.exclude)) if spec.exclude else set()
    for node in sorted(excluded - names)[:3]:
        problems.append(f"--exclude names {node}, which partition {name} does not have")
    left = [node for node in partition.nodes if node.name not in excluded]
    without = f" ({len(excluded & names)} of them excluded)" if excluded & names else ""
    if spec.nodes > len(left):
        problems.append(
            f"--nodes {spec.nodes} is more than partition {name} has: {len(partition.nodes)} nodes{without}; it would "
            "wait for ever"
        )
    if partition.max_nodes is not None and spec.nodes > partition.max_nodes:
        problems.append(f"--nodes {spec.nodes} is more than partition {name} allows for one job: {partition.max_nodes}")
    with_gpus = sum(node.gpus >= spec.gpus_per_node for node in left)
    if spec.gpus_per_node and with_gpus < spec.nodes <= len(left):
        most = max(node.gpus for node in left)
        problems.append(
            f"--gpus-per-node {spec.gpus_per_node}: {with_gpus} nodes of partition {name} have as many (the most is {most})"
        )
    with_cpus = sum(node.cpus >= spec.cpus_per_task for node in left)
    if spec.cpus_per_task and with_cpus < spec.nodes <= len(left):
        problems.append(f"--cpus-per-task {spec.cpus_per_task}: {with_cpus} nodes of partition {name} have as many")
    minutes = parse_minutes(spec.time) if spec.time else None
    if minutes is not None and partition.max_minutes is not None and minutes > partition.max_minutes:
        problems.append(f"--time {spec.time} is longer than partition {name} allows: {partition.max_minutes:g} minutes")
    return problems


def check_account(spec: JobSpec, accounts: Mapping[str, set[str]] | None) -> list[str]:
    """Problems of account and qos, where slurmdbd can tell (None: it cannot)."""
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
    """Problems of the time limit and of how early Slurm warns, against the time that a checkpoint takes."""
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
            f"--time {spec.time} is not longer than the {spec.signal_seconds} s before its end at which Slurm warns: "
            "nothing would be trained; raise it, or lower --signal-seconds"
        )
    return problems


def refuse(problems: list[str]) -> None:
    """Raises LaunchError with all problems, if any."""
    if problems:
        raise LaunchError("; ".join(problems))


def already_active(job: str, name: str, jobs: list[slurm.Job]) -> slurm.Job | None:
    """The job in the queue that has this id (or is a task of it), or this name."""
    for found in jobs:
        if found.state in slurm.ACTIVE and (
            (job and (found.job_id == job or found.job_id.split("_")[0] == job)) or (name and found.name == name)
        ):
            return found
    return None
