"""Writes the sbatch script of a run from a JobSpec; every value that comes from a user is quoted."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launchers.errors import LaunchError
from launchers.folder.secrets import REMOVED, has_secret, hidden
from launchers.slurm.set_up import checked, without_variables

_PLAIN = re.compile(r"[A-Za-z0-9_./:,+@%=\[\]*-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Options that this file writes. If a user gives them too, Slurm's order decides which one counts, so they are refused.
_OURS = {
    "job-name",
    "output",
    "error",
    "signal",
    "requeue",
    "no-requeue",
    "open-mode",
    "array",
    "ntasks-per-node",
    "nodes",
}


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One sbatch script. Option names are sbatch's; ``folder`` is the run's `launch` folder, absolute."""

    name: str
    folder: Path
    workdir: Path
    python: str
    code_root: Path
    nodes: int
    processes_per_node: int
    time: str = ""
    gpus_per_node: int = 0
    gpu_request: str = ""  # the GPUs in sbatch's form if they have types (`a100:4`)
    gres: str = ""  # if GPUs were requested by --gres: written instead of --gpus-per-node
    cpus_per_task: int = 0
    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    exclusive: bool = True
    signal_seconds: int = 300
    checkpoint_signal: str = "USR1"
    dependency: str = ""
    array: str = ""
    sbatch_args: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    container_image: str = ""
    container_mounts: tuple[str, ...] = ()
    container_python: str = "python3"


def parse_environment(pairs: list[str]) -> dict[str, str]:
    """Parse `K=V` arguments. Raises LaunchError for an invalid name."""
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not _VARIABLE.fullmatch(name):
            raise LaunchError(f"--env {pair!r} is not of the form NAME=VALUE")
        found[name] = value
    return found


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises LaunchError for variables that may not be written into a script: invalid names, secrets, NUL."""
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name):
            raise LaunchError(f"environment variable {name!r}: a name has letters, digits and _ only")
        if hidden(name, value) == REMOVED:
            raise LaunchError(
                f"environment variable {name} looks like a secret, by its name or its value, and secrets are not written "
                "into scripts: export it in the shell that runs `qwen-moe launch`, and sbatch passes it on, or read it "
                "from a file of yours in the site file's setup.commands"
            )
        if "\0" in value:
            raise LaunchError(f"environment variable {name} contains a NUL character")


def check_texts(spec: JobSpec) -> None:
    """Raises LaunchError if a set-up command or a free option contains a key or token itself."""
    for what, texts in (("setup.commands", spec.setup), ("--sbatch", spec.sbatch_args), ("srun_args", spec.srun_args)):
        for text in texts:
            if has_secret(text):
                raise LaunchError(
                    f"{what}: {text[:20]!r}... contains what looks like a key, a token or a password, and these are not "
                    "written into scripts: read it from a file of yours, `export NAME=$(cat FILE)`"
                )


def _header_value(option: str, value: str) -> str:
    if "\n" in value or "\r" in value or "\0" in value:
        raise LaunchError(f"{option} {value!r} holds a line break, which a line of sbatch options cannot hold")
    return value if _PLAIN.fullmatch(value) else shlex.quote(value)


def free_option(text: str) -> tuple[str, str]:
    """Parse `any=flag` or `--any=flag` into (name, value). Raises LaunchError if it is not an option, or one of ours."""
    name, _, value = text.removeprefix("--").partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise LaunchError(f"--sbatch {text!r} is not a long option of sbatch: give it as 'name=value' or 'name'")
    if name in _OURS:
        raise LaunchError(f"--sbatch {text!r}: --{name} is written by qwen-moe; use its own option or leave it out")
    return name, value


def _slurm_pattern(folder: Path) -> bool:
    """True if Slurm would replace parts of this folder's name in the path of a log."""
    return "%" in str(folder) or "\\" in str(folder)


def _options(spec: JobSpec) -> list[tuple[str, str, str]]:
    """(comment, option, value) of every #SBATCH line."""
    found = [
        ("", "job-name", spec.name),
        ("", "nodes", str(spec.nodes)),
        ("one elastic agent per node; it starts the node's processes", "ntasks-per-node", "1"),
    ]
    if spec.gres:
        found.append(("", "gres", spec.gres))
    elif spec.gpus_per_node:
        found.append(("", "gpus-per-node", spec.gpu_request or str(spec.gpus_per_node)))
    found += [("", "cpus-per-task", str(spec.cpus_per_task))] if spec.cpus_per_task else []
    found += [("whole nodes: all their CPUs and memory", "exclusive", ""), ("", "mem", "0")] if spec.exclusive else []
    found += [("", "time", spec.time)] if spec.time else []
    for option in ("account", "partition", "qos", "constraint", "exclude"):
        value = getattr(spec, option)
        found += [("", option, value)] if value else []
    log = "slurm-%A_%a.out" if spec.array else "slurm-%j.out"
    log_note = "relative to the folder that sbatch is called in: the run's launch folder"
    if _slurm_pattern(spec.folder):
        log, log_note = (
            "/dev/null",
            "Slurm would replace what follows % in the folder's name, so the log is opened below",
        )
    signal_note = f"warn the script (B:) {spec.signal_seconds} s before the time limit: checkpoint, then requeue"
    found += [
        (log_note, "output", log),
        ("a restarted job appends to the same log", "open-mode", "append"),
        ("restart the job automatically when a node fails", "requeue", ""),
        (signal_note, "signal", f"B:{spec.checkpoint_signal}@{spec.signal_seconds}"),
    ]
    found += [("tasks, and how many run at a time", "array", spec.array)] if spec.array else []
    if spec.dependency:
        note = "singleton: never two jobs of this name at once" if "singleton" in spec.dependency else ""
        found += [(note, "dependency", spec.dependency)]
        found += [("", "kill-on-invalid-dep", "yes")] if "afterok" in spec.dependency else []
    found += [("", *free_option(text)) for text in spec.sbatch_args]
    return found


def _own_log(spec: JobSpec) -> list[str]:
    if not _slurm_pattern(spec.folder):
        return []
    number = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if spec.array else "${SLURM_JOB_ID}"
    return [f"exec >> {shlex.quote(str(spec.folder) + '/')}slurm-{number}.out 2>&1"]


def _srun(spec: JobSpec) -> list[str]:
    """srun's arguments, quoted, one per line of the script."""
    found = [
        '--nodes="$SLURM_JOB_NUM_NODES"',
        "--export=ALL",  # sites set SBATCH_EXPORT=NONE, which would hide this script's variables from srun's processes
        "--ntasks-per-node=1",
        "--label",
        "--cpu-bind=none",  # the agent gives each of its processes a share of the node's CPUs
        "--kill-on-bad-exit=0",  # the conductor first asks every rank for its stack, then stops them all
        "--wait=300",  # in case the conductor does not do so
    ]
    found += [f"--cpus-per-task={spec.cpus_per_task}"] if spec.cpus_per_task else []
    if spec.container_image:
        found.append(f"--container-image={shlex.quote(spec.container_image)}")
        ours = [f"{path}:{path}" for path in dict.fromkeys((spec.folder.parent, spec.code_root, spec.workdir))]
        for mount in (*ours, *spec.container_mounts):
            if "," in mount:
                raise LaunchError(f"container mount {mount!r} contains a comma, which pyxis reads as the next mount")
        found.append(f"--container-mounts={shlex.quote(','.join((*ours, *spec.container_mounts)))}")
        found.append(f"--container-workdir={shlex.quote(str(spec.workdir))}")
    return found + [shlex.quote(argument) for argument in spec.srun_args]


def render(spec: JobSpec) -> str:
    """The script. Raises LaunchError for values that cannot be written safely."""
    check_environment(spec.environment)
    check_texts(spec)
    lines = ["#!/bin/bash"]
    for comment, option, value in _options(spec):
        lines += [f"# {comment}"] if comment else []
        lines.append(f"#SBATCH --{option}" + (f"={_header_value('--' + option, value)}" if value else ""))
    python = spec.container_python if spec.container_image else spec.python
    lines += [
        "",
        "# A warning that comes before the conductor handles it must not kill this shell.",
        f"trap '' {spec.checkpoint_signal}",
        "set -u",
        *_own_log(spec),
        f"cd -- {shlex.quote(str(spec.workdir))} || exit 1",
    ]
    lines += without_variables()
    if spec.setup:
        lines += [
            "",
            "# From the site file. A command that fails ends the job.",
            "set +u",
            *checked(spec.setup),
            "set -u",
        ]
    lines += [
        "",
        f"export PYTHONPATH={shlex.quote(str(spec.code_root))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1",
        *(f"export {name}={shlex.quote(value)}" for name, value in spec.environment.items()),
    ]
    lines += ["export SRUN_CPUS_PER_TASK=" + str(spec.cpus_per_task)] if spec.cpus_per_task else []
    lines += ["", "on_every_node=(", "  srun", *(f"  {argument}" for argument in _srun(spec))]
    lines += [f"  {shlex.quote(python)} -u", ")", ""]
    lines += [
        "# The conductor runs on the first node. It starts `srun ... -m launchers.job.node_facts` (preflight) and",
        "# `srun ... -m AGENT` (launch.json names it; it starts the ranks) on every node, watches them, and decides:",
        "# go on, requeue, exclude a node, stop.",
    ]
    which = "--array" if spec.array else "--run"
    where = spec.folder / "tasks.json" if spec.array else spec.folder.parent
    lines += [
        f"exec {shlex.quote(spec.python)} -u -m launchers.job.conductor {which} {shlex.quote(str(where))} "
        '-- "${on_every_node[@]}"',
        "",
    ]
    return "\n".join(lines)
