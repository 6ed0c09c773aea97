"""Parses a job's request as sbatch writes it: lists of partitions, GPUs by type, and free options that JobSpec has a field
for, so that `--sbatch partition=a,b` is checked like `--partition a,b`."""

import re
from collections.abc import Sequence

from launchers.errors import LaunchError
from launchers.slurm.script import free_option

_GPUS = re.compile(r"(?:([^:,=\s]+)[:=])?([0-9]{1,9})")
# Free options that JobSpec has a field for.
_FIELDS = ("account", "partition", "qos", "constraint", "exclude", "time", "gpus-per-node", "cpus-per-task")


def parse_gpus(text: str, option: str = "--gpus-per-node") -> dict[str, int]:
    """Parse `8`, `a100:4` or `a100:2,h100:2` into counts by type ("" is any type). Raises LaunchError otherwise."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = _GPUS.fullmatch(part.strip())
        if not match or not int(match[2]):
            raise LaunchError(
                f"{option} {text[:60]!r}: expected a number of GPUs, 1 or more, or TYPE:NUMBER such as a100:4"
            )
        kind = match[1] or ""
        if kind in found:
            raise LaunchError(f"{option} {text[:60]!r} names {kind or 'GPUs of any type'} twice")
        found[kind] = int(match[2])
    return found


def gpus_in_gres(text: str) -> tuple[str, str]:
    """Split sbatch's `--gres` into (its GPUs, in the form of `--gpus-per-node`; the rest). `gpu` alone is one GPU."""
    gpus, rest = [], []
    for entry in filter(None, text.split(",")):
        name, *parts = re.split("[:=]", re.sub(r"^gres[:/]", "", entry.strip()))
        if name != "gpu":
            rest.append(entry)
        elif not parts or not parts[-1].isdecimal():
            gpus.append(":".join([*parts, "1"]))
        elif int(parts[-1]):
            gpus.append(":".join(parts))
    return ",".join(gpus), ",".join(rest)


def split_names(text: str) -> list[str]:
    """Split `a,b` into names. Raises LaunchError for an empty name."""
    names = [name.strip() for name in text.split(",")] if text else []
    if not all(names):
        raise LaunchError(f"--partition {text!r} contains an empty name: separate names with one comma")
    return list(dict.fromkeys(names))


def take_known(texts: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split free options into (those that JobSpec has a field for, by the field's name; the others unchanged).

    GPUs in `gres` become ``gpus_per_node``. ``gres`` keeps the option as given, for clusters without `--gpus-per-node`.
    Raises LaunchError for an option that is given twice with different values.
    """
    known: dict[str, str] = {}
    others: list[str] = []
    for text in texts:
        name, value = free_option(text)
        if name in _FIELDS:
            _add(known, name, value)
        elif name == "gres" and gpus_in_gres(value)[0]:
            _add(known, "gres", value)
            _add(known, "gpus-per-node", gpus_in_gres(value)[0])
        else:
            others.append(text)
    return {name.replace("-", "_"): value for name, value in known.items()}, tuple(others)


def _add(known: dict[str, str], name: str, value: str) -> None:
    if not value:
        raise LaunchError(f"--sbatch {name!r} has no value: give it as '{name}=VALUE'")
    if known.get(name, value) != value:
        raise LaunchError(f"--sbatch gives --{name} as {known[name]!r} and as {value!r}: leave one out")
    known[name] = value
