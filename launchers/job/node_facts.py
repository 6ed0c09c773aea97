"""`python -m launchers.job.node_facts ATTEMPT`: one node's hardware and software as JSON; needs only Python."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.folder.run_folder import Attempt, read_json
from launchers.folder.secrets import hidden, is_secret
from launchers.folder.snapshot import code_hash, versions
from launchers.job.cluster import own_node_name

_GPU_FIELDS = (
    "index",
    "name",
    "uuid",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total",
    "temperature.gpu",
    "pstate",
)
_ENVIRONMENT = ("NCCL_", "GLOO_", "OMP_", "CUDA_", "TORCH_", "PYTORCH_", "SLURM_", "UCX_", "FI_", "NVTE_")


def gpus() -> list[dict[str, str]]:
    """nvidia-smi's table; empty if it is not installed. If it fails, one entry `{"error": ...}`."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return [{"error": "nvidia-smi did not answer within 60 s"}]
    if done.returncode:
        return [{"error": (done.stderr or done.stdout).strip()[:300] or f"nvidia-smi exit code {done.returncode}"}]
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(_GPU_FIELDS, row)) for row in rows]


def gather(disk_folder: Path, packages: Sequence[str]) -> dict[str, Any]:
    """Everything that the preflight judges and records, without variables that look like secrets.

    ``packages`` are the folders next to this package whose code the nodes compare.
    """
    try:
        free: float | None = shutil.disk_usage(disk_folder).free
        disk_error = "" if os.access(disk_folder, os.W_OK) else f"{disk_folder} is not writable"
    except OSError as error:
        free, disk_error = None, str(error)
    environment = {
        name: hidden(name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(_ENVIRONMENT) and not (is_secret(name) and hidden(name, value) != value)
    }
    return {
        "host": platform.node(),
        "time": time.time(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions(),
        "code": code_hash(Path(__file__).resolve().parents[2], packages),
        "gpus": gpus(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "disk_folder": str(disk_folder),
        "disk_free": free,
        "disk_error": disk_error,
        "switch": os.environ.get("SLURM_TOPOLOGY_ADDR", ""),
        "environment": environment,
    }


def main(folder: str) -> int:
    attempt = Attempt(Path(folder))
    plan = attempt.read("plan.json")
    limits = plan["preflight"]
    disk = Path(limits["disk_folder"] or plan["local_folder"])
    # Compare this node's clock with the shared file system's: a file's modification time comes from its server.
    name = own_node_name(os.environ)
    facts = gather(disk, plan.get("packages", []))
    probe = attempt.folder / "facts" / f".clock-{name}"
    before = time.time()
    probe.write_text("")
    facts["clock_skew"] = before - probe.stat().st_mtime
    probe.unlink()
    attempt.write(f"facts/{name}.json", facts, private=True)  # it holds environment variables
    return 0 if read_json(attempt.folder / "facts" / f"{name}.json") is not None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
