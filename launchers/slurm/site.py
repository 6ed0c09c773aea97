"""The site file: one TOML file with the settings that all jobs on a cluster share; unknown keys are errors."""

import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launchers.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class SlurmDefaults:
    """Table [slurm]: sbatch's long options in snake_case, used if the command line does not give them."""

    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int = 0  # 0: one per GPU, or one if there are no GPUs
    cpus_per_task: int = 0  # 0: all CPUs of the node (with exclusive)
    time: str = ""
    exclusive: bool = True
    signal_seconds: int = 300  # how long before the time limit Slurm warns
    sbatch_args: list[str] = field(default_factory=list)  # "any=flag", as with --sbatch
    srun_args: list[str] = field(default_factory=list)  # "--mpi=none", appended to srun


@dataclass(frozen=True, kw_only=True)
class SetupCommands:
    """Table [setup]: shell lines that run on the first node before anything else, and the interpreter of every node."""

    commands: list[str] = field(default_factory=list)
    python: str = ""  # "" : the one that runs `qwen-moe launch`; must be on a file system that the nodes share
    local_folder: str = "/tmp"  # a folder on each node's own disk, for heartbeats and for logs before they are copied


@dataclass(frozen=True, kw_only=True)
class ContainerDefaults:
    """Table [container]: pyxis/enroot."""

    image: str = ""
    mounts: list[str] = field(default_factory=list)
    python: str = "python3"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Table [hardware]: used for estimates only."""

    price_per_gpu_hour: float = 0.0
    currency: str = "USD"
    peak_tflops: float = 0.0  # of one GPU in the recipe's precision
    expected_utilisation: float = 0.35
    checkpoint_gb_per_second: float = 1.0  # used until a run has measured its own


@dataclass(frozen=True, kw_only=True)
class PreflightLimits:
    """Table [preflight]: what a node must have before the model is built; 0 disables a limit."""

    level: str = "full"  # full, quick (no bandwidth test), off
    timeout_seconds: float = 300
    min_all_reduce_gb_per_second: float = 0.0
    min_all_to_all_gb_per_second: float = 0.0
    message_mb: float = 64
    min_free_disk_gb: float = 1.0
    disk_folder: str = ""  # "" : setup.local_folder
    max_clock_skew_seconds: float = 5.0
    min_gpu_clock_share: float = 0.0  # share of the GPU's own maximum; 0 by default, because idle clocks are often low
    max_ecc_errors: int = 0  # uncorrected, volatile


@dataclass(frozen=True, kw_only=True)
class SurviveLimits:
    """Table [survive]: when a run counts as hung, and how often it is restarted."""

    hang_seconds: float = 600  # hung if no rank has finished a step or saved for so long
    startup_seconds: float = 1800  # the same limit before the first step and after the last
    stop_seconds: float = 60  # from the decision to stop until the last process is gone
    max_restarts: int = 50
    max_failures_without_progress: int = 2
    exclude_after: int = 2  # failures of the same node in a row
    checkpoint_signal: str = "USR1"  # NCCL or a site may use it: any of USR1, USR2, HUP, URG, WINCH
    stack_signal: str = "USR2"


@dataclass(frozen=True, kw_only=True)
class Site:
    """Everything a site file may say."""

    slurm: SlurmDefaults = SlurmDefaults()
    setup: SetupCommands = SetupCommands()
    container: ContainerDefaults = ContainerDefaults()
    hardware: Hardware = Hardware()
    preflight: PreflightLimits = PreflightLimits()
    survive: SurviveLimits = SurviveLimits()
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_*, GLOO_*, ...: exported in the script
    source: str = ""


_TABLES: dict[str, type] = {
    "slurm": SlurmDefaults,
    "setup": SetupCommands,
    "container": ContainerDefaults,
    "hardware": Hardware,
    "preflight": PreflightLimits,
    "survive": SurviveLimits,
}
_SIGNALS = ("USR1", "USR2", "HUP", "URG", "WINCH")


def default_site_path() -> Path:
    """`$XDG_CONFIG_HOME/qwen-moe/slurm.toml`, or under ~/.config if that variable is not set."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "qwen-moe" / "slurm.toml"


def load_site(path: Path | None = None) -> Site:
    """Read the site file; without ``path``, the default one if it exists. Raises LaunchError, which names every mistake."""
    if path is None:
        path = default_site_path()
        if not path.exists():
            return Site()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LaunchError(f"site file {path} does not exist: give the path of a TOML file (docs/slurm.md)") from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"site file {path} cannot be read: {error}") from None
    return parse_site(values, str(path))


def parse_site(values: Mapping[str, Any], source: str) -> Site:
    """Make a Site from the tables of a TOML document. One LaunchError names every mistake."""
    problems: list[str] = []
    sections: dict[str, Any] = {}
    for name, content in values.items():
        if name not in _TABLES and name != "environment":
            problems.append(_unknown(name, [*_TABLES, "environment"], "table"))
        elif not isinstance(content, dict):
            problems.append(f"{name} must be a table [{name}]")
        elif name == "environment":
            sections[name] = _environment(content, problems)
        else:
            sections[name] = _section(name, _TABLES[name], content, problems)
    if not problems:
        problems = _ranges(Site(**sections))
    if problems:
        raise LaunchError(f"site file {source}: {'; '.join(problems)}")
    return Site(**sections, source=source)


def _unknown(name: str, valid: list[str], kind: str) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    return f"unknown {kind} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}")


def _environment(content: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    for key, value in content.items():
        if isinstance(value, dict | list | bool) or (isinstance(value, float) and not math.isfinite(value)):
            problems.append(f"environment.{key} must be a string or a number")
    return {key: str(value) for key, value in content.items()}


def _section(name: str, kind: type, content: Mapping[str, Any], problems: list[str]) -> Any:
    known = {f.name: f for f in fields(kind)}
    default = kind()
    for key, value in content.items():
        if key not in known:
            problems.append(_unknown(f"{name}.{key}", [f"{name}.{k}" for k in known], "key"))
            continue
        wanted = type(getattr(default, key))
        fits = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
        if not fits and not (wanted is float and type(value) is int):
            problems.append(f"{name}.{key} is {value!r}, expected {wanted.__name__}")
        elif wanted is list and not all(isinstance(item, str) for item in value):
            problems.append(f"{name}.{key} must be a list of strings")
    return kind(**{k: v for k, v in content.items() if k in known})


def _ranges(site: Site) -> list[str]:
    problems = []
    if site.preflight.level not in ("full", "quick", "off"):
        problems.append(f"preflight.level is {site.preflight.level!r}, expected full, quick or off")
    for key in ("checkpoint_signal", "stack_signal"):
        if getattr(site.survive, key) not in _SIGNALS:
            problems.append(f"survive.{key} is {getattr(site.survive, key)!r}, expected one of {', '.join(_SIGNALS)}")
    if site.survive.checkpoint_signal == site.survive.stack_signal:
        problems.append("survive.checkpoint_signal and survive.stack_signal must differ")
    for table in ("slurm", "hardware", "preflight", "survive"):
        section = getattr(site, table)
        for entry in fields(section):
            value = getattr(section, entry.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:  # also refuses NaN
                problems.append(f"{table}.{entry.name} is {value}, expected a number of 0 or more")
    return problems
