"""One process of a run: who it is (torchrun or Slurm), its device, its process group, and its end."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported in `start`: who this process is, is asked before anything waits for it
    import torch


class ProcessError(ValueError):
    """The environment that should say which process this is does not."""


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """Global and node-local position of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def _from_slurm(environ: dict[str, str]) -> ProcessInfo:
    info = ProcessInfo(
        rank=int(environ["SLURM_PROCID"]),
        world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        local_world_size=int(environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]),
    )
    if "MASTER_ADDR" not in os.environ:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000))
    return info


def started_by_launcher(environ: dict[str, str] | None = None) -> bool:
    """True when torchrun, or an srun step of several tasks, has started this process."""
    environ = dict(os.environ) if environ is None else environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return True
    return "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def process_info(environ: dict[str, str] | None = None) -> ProcessInfo:
    """This process's place, from torchrun's variables, else Slurm's, else the only one (a free port is chosen)."""
    environ = dict(os.environ) if environ is None else environ
    try:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return ProcessInfo(
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", "0")),
                local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
            )
        if started_by_launcher(environ):
            return _from_slurm(environ)
    except (KeyError, ValueError) as error:
        raise ProcessError(f"the launcher's environment is incomplete: {error}") from error
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    return ProcessInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)


def start(info: ProcessInfo, threads: int = 0, timeout_minutes: float = 30) -> "torch.device":
    """Join the process group (NCCL with gloo for CPU tensors on GPUs, else gloo) and return this process's device.

    ``threads``: CPU threads of this process; 0 means the node's cores divided by its processes.
    """
    die_with_parent()
    import torch
    import torch.distributed as dist

    from parallel.trace import enable_recorder

    enable_recorder()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // info.local_world_size))
    if torch.cuda.is_available():
        device = torch.device("cuda", info.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(
        backend, rank=info.rank, world_size=info.world_size, timeout=timedelta(minutes=timeout_minutes)
    )
    return device


def die_with_parent() -> None:
    """Ask the kernel (Linux) to send SIGTERM here when the parent process dies, so that no rank is orphaned."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
