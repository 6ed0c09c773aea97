"""Judges nodes before the model is built: compares their facts and bandwidth with the site's limits and with each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from launchers.counted import counted
from launchers.folder.logs import read_tail
from launchers.folder.run_folder import Attempt


@dataclass(frozen=True)
class Verdict:
    """Nodes that may not take part, and why. No single node causes ``problem``. ``lines`` are for the log."""

    bad_nodes: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    lines: list[str] = field(default_factory=list)


def judge(stage: str, attempt: Attempt, nodes: Sequence[str], limits: Mapping[str, Any], code_hash: str) -> Verdict:
    """The verdict on stage ``facts`` or ``bandwidth``, from the files that the nodes wrote."""
    log = read_tail(attempt.folder / f"{stage}.log", 5)
    if stage == "facts":
        return judge_facts(attempt.read_all("facts"), nodes, limits, code_hash, log)
    return judge_bandwidth(attempt.read_all("bandwidth"), nodes, limits, log)


def _missing(found: Mapping[str, Any], nodes: Sequence[str], what: str, log: str) -> Verdict | None:
    absent = [node for node in nodes if node not in found]
    if not absent:
        return None
    if len(absent) == len(nodes):
        return Verdict(problem=f"no node reported its {what}; the end of the log: {log or 'empty'}")
    return Verdict(bad_nodes=dict.fromkeys(absent, f"did not report its {what} in time"))


def judge_facts(
    facts: Mapping[str, Mapping[str, Any]],
    nodes: Sequence[str],
    limits: Mapping[str, Any],
    code_hash: str,
    log: str = "",
) -> Verdict:
    """Judge each node by itself, then compare it with the majority of nodes."""
    missing = _missing(facts, nodes, "facts", log)
    if missing is not None:
        return missing
    bad: dict[str, list[str]] = {node: [] for node in nodes}
    middle = median(float(facts[node].get("clock_skew") or 0) for node in nodes)
    for node in nodes:
        bad[node] += _alone(facts[node], limits, middle)
    for label, value in (
        ("Python", lambda f: f["python"]),
        ("packages", lambda f: tuple(sorted(f["packages"].items()))),
        ("code", lambda f: f["code"]),
        ("GPUs", lambda f: (len(f["gpus"]), tuple(sorted({g.get("name", "") for g in f["gpus"]})))),
        ("GPU driver", lambda f: tuple(sorted({g.get("driver_version", "") for g in f["gpus"]}))),
    ):
        values = {node: value(facts[node]) for node in nodes}
        usual, _ = Counter(values.values()).most_common(1)[0]
        for node in nodes:
            if values[node] != usual:
                bad[node].append(f"{label} differ from the other nodes': {_short(values[node], usual)}")
    lines = [_line(node, facts[node], bad[node]) for node in nodes]
    if code_hash and any(facts[node]["code"] != code_hash for node in nodes):
        lines.append("preflight: note: the code has changed since this run was launched")
    return Verdict(bad_nodes={node: "; ".join(why) for node, why in bad.items() if why}, lines=lines)


def _alone(facts: Mapping[str, Any], limits: Mapping[str, Any], middle_skew: float) -> list[str]:
    found = []
    if facts.get("disk_error"):
        found.append(f"disk: {facts['disk_error']}")
    elif facts["disk_free"] < float(limits["min_free_disk_gb"]) * 1e9:
        found.append(
            f"{facts['disk_folder']} has {facts['disk_free'] / 1e9:.2f} GB free, {limits['min_free_disk_gb']:g} are needed"
        )
    skew = abs(float(facts.get("clock_skew") or 0) - middle_skew)
    if limits["max_clock_skew_seconds"] and skew > float(limits["max_clock_skew_seconds"]):
        found.append(f"its clock is {skew:.1f} s off")
    for gpu in facts["gpus"]:
        if "error" in gpu:
            found.append(gpu["error"])
            continue
        errors = gpu.get("ecc.errors.uncorrected.volatile.total", "")
        if errors.isdigit() and int(errors) > int(limits["max_ecc_errors"]):
            found.append(f"GPU {gpu['index']} has {errors} uncorrected ECC errors")
        clock, highest = gpu.get("clocks.sm", ""), gpu.get("clocks.max.sm", "")
        share = float(limits["min_gpu_clock_share"])
        if share and clock.isdigit() and highest.isdigit() and int(clock) < share * int(highest):
            found.append(f"GPU {gpu['index']} runs at {clock} of {highest} MHz")
    return found


def _short(value: Any, usual: Any) -> str:
    if isinstance(value, tuple) and isinstance(usual, tuple) and value and isinstance(value[0], tuple):
        here, there = dict(value), dict(usual)
        names = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
        return ", ".join(f"{name} {here.get(name, 'missing')} (others {there.get(name, 'none')})" for name in names[:5])
    return f"{str(value)[:80]} (others {str(usual)[:80]})"


def _line(node: str, facts: Mapping[str, Any], bad: Sequence[str]) -> str:
    names = Counter(gpu.get("name", "?") for gpu in facts["gpus"])
    what = ", ".join(f"{count} x {name}" for name, count in names.items()) or counted(facts["cpus"], "CPU")
    free = f"{facts['disk_free'] / 1e9:.1f} GB free" if facts["disk_free"] is not None else "no disk"
    return f"preflight: {node}: {what}, {free}: " + ("; ".join(bad) or "good")


def judge_bandwidth(
    found: Mapping[str, Mapping[str, float]], nodes: Sequence[str], limits: Mapping[str, Any], log: str = ""
) -> Verdict:
    """``found``: node -> GB/s of `all_reduce`, `all_to_all` (all nodes together) and `pair` (its best with any partner).

    A collective over all ranks is as slow as its slowest node but does not name it. If a collective is below its limit, the
    nodes to blame are those whose best pair is below the limit and far behind the others' or, if there are none, all whose
    best pair is below the limit.
    """
    missing = _missing(found, nodes, "bandwidth", log)
    if missing is not None:
        return missing
    lines = []
    slow: list[str] = []
    for name in ("all_reduce", "all_to_all"):
        limit = float(limits[f"min_{name}_gb_per_second"])
        reached = min(found[node][name] for node in nodes)
        lines.append(f"preflight: {name.replace('_', '-')} {reached:.3f} GB/s per node (limit {limit:g})")
        if limit and reached < limit:
            slow.append(f"{name.replace('_', '-')} at {reached:.3f} GB/s per node, below the limit of {limit:g}")
    if len(nodes) > 1:
        lines += [f"preflight: {node}: best pair {found[node]['pair']:.3f} GB/s" for node in nodes]
    if not slow:
        return Verdict(lines=lines)
    limit = max(float(limits["min_all_reduce_gb_per_second"]), float(limits["min_all_to_all_gb_per_second"]))
    if len(nodes) > 1:
        best = max(found[node]["pair"] for node in nodes)
        behind = {node for node in nodes if found[node]["pair"] < min(limit, 0.5 * best)}
        blamed = behind or {node for node in nodes if found[node]["pair"] < limit}
        if blamed:
            why = slow[0]
            return Verdict(
                bad_nodes={node: f"best pair {found[node]['pair']:.3f} GB/s ({why})" for node in sorted(blamed)},
                lines=lines,
            )
    return Verdict(problem=f"{slow[0]}, and no single node is to blame", lines=lines)
