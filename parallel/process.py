"""One process of a run: its rank (from torchrun or Slurm), its device, its process group, and its end."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from parallel.counted import counted
from parallel.threads import Threads, available_cpus, choose_threads

if TYPE_CHECKING:  # torch is imported in `start`, so that asking for the rank does not wait for it
    import torch
    from torch.distributed import Store


class ProcessError(ValueError):
    """This process cannot join the run: the launcher gave no rank, other ranks are missing, or its GPU is taken."""


_LEFT_BEHIND = (
    "If torchrun or srun started this process, check how; if an earlier job left these variables in this shell, `unset RANK "
    "WORLD_SIZE MASTER_ADDR MASTER_PORT`"
)


class PeerError(ProcessError):
    """This process is ready, but another one did not come or ended first."""


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


def _from_torchrun(environ: dict[str, str]) -> ProcessInfo:
    """Also the ranks that another launcher, or a user, names in torchrun's variables."""
    found: dict[str, int] = {}
    own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": environ["WORLD_SIZE"]}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        text, least = environ.get(name, own.get(name, "")), int(name.endswith("SIZE"))
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise ProcessError(f"{name} is {text!r}, expected a whole number of at least {least}. {_LEFT_BEHIND}")
        found[name] = int(text)
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise ProcessError(
            f"RANK is {found['RANK']}, expected one below WORLD_SIZE, which is {found['WORLD_SIZE']}. {_LEFT_BEHIND}"
        )
    return ProcessInfo(
        rank=found["RANK"],
        world_size=found["WORLD_SIZE"],
        local_rank=found["LOCAL_RANK"],
        local_world_size=found["LOCAL_WORLD_SIZE"],
    )


def _check_address(info: ProcessInfo) -> None:
    """Raise ProcessError unless the environment says where rank 0 is."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host:
        raise ProcessError(
            f"RANK is {info.rank} and WORLD_SIZE is {info.world_size}, but MASTER_ADDR is not set, so nobody knows where "
            f"rank 0 is. {_LEFT_BEHIND}"
        )
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        given = f"is {port!r}" if port else "is not set"
        raise ProcessError(f"MASTER_PORT {given}, expected a port from 1 to 65535. {_LEFT_BEHIND}")


def started_by_launcher(environ: dict[str, str] | None = None) -> bool:
    """Whether torchrun, or an srun step of several tasks, started this process."""
    environ = dict(os.environ) if environ is None else environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return True
    return "SLURM_STEP_ID" in environ and environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def process_info(environ: dict[str, str] | None = None) -> ProcessInfo:
    """This process's ranks from torchrun's variables, else from Slurm's; else it is the only one, and gets a free port.

    Raises ProcessError when the variables are incomplete."""
    environ = dict(os.environ) if environ is None else environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    try:
        if started_by_launcher(environ):
            return _from_slurm(environ)
    except (KeyError, ValueError) as error:
        why = f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error)
        raise ProcessError(
            f"the launcher's environment is incomplete: SLURM_STEP_NUM_TASKS is {environ['SLURM_STEP_NUM_TASKS']!r}, but "
            f"{why}. If srun started this process, check how; if an earlier job left these variables in this shell, `unset "
            "SLURM_STEP_ID`"
        ) from error
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    return ProcessInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)


def start(
    info: ProcessInfo,
    threads: Threads | None = None,
    timeout_minutes: float = 30,
    admit: Callable[[], None] | None = None,
) -> "torch.device":
    """Join the process group (with GPUs: NCCL, and gloo for CPU tensors; else gloo) and return this process's device. On a
    CPU, memory that is freed stays with the process from now on (`keep_freed_memory`).

    ``threads``: CPU threads of this process (`own_threads` by default). ``admit``: rank 0 calls it when all ranks have
    arrived; an exception in it ends every rank. Raises PeerError naming the ranks that do not arrive.
    """
    _check_address(info)
    die_with_parent()
    import torch
    import torch.distributed as dist

    from parallel.heap import keep_freed_memory
    from parallel.rendezvous import PATIENCE_SECONDS, MeetingError, meet
    from parallel.trace import enable_recorder

    enable_recorder()
    torch.set_num_threads((threads or own_threads(info)).count)
    if torch.cuda.is_available():
        device = torch.device("cuda", info.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        keep_freed_memory()
        device, backend = torch.device("cpu"), "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        patience = min(PATIENCE_SECONDS, 60 * timeout_minutes)
        store = meet(info.rank, info.world_size, patience=patience, admit=admit)
    except MeetingError as error:
        raise PeerError(str(error)) from None
    if device.type == "cuda":
        _claim_gpu(store, str(torch.cuda.get_device_properties(device).uuid), info, torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size, timeout=timeout)
    return device


def _claim_gpu(store: "Store", gpu: str, info: ProcessInfo, visible: int) -> None:
    """Raise ProcessError if another rank has the same GPU. NCCL would refuse it later with a less helpful message."""
    if store.add(f"gpu/{gpu}", 1) > 1:
        raise ProcessError(
            f"rank {info.rank} has the same GPU as another rank: "
            f"{counted(info.local_world_size, 'process was', 'processes were')} started on "
            f"{socket.gethostname()}, where each sees {visible} GPU{'s' if visible > 1 else ''}. Start no more processes "
            "than there are GPUs (launch.nproc, torchrun --nproc-per-node, srun --ntasks-per-node), or set "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def own_threads(info: ProcessInfo, asked: int = 0, before: int = 0) -> Threads:
    """CPU threads of this process. Processes that start together cannot tell each other's load from other users' load, so
    the load counts only for a process that is alone on its node, or in the parent that starts them (`parallel.threads`)."""
    environ = dict(os.environ)
    shared = info.local_world_size
    on_node = environ.get("SLURM_CPUS_ON_NODE", "")
    if "RANK" not in environ and on_node.isdecimal() and available_cpus()[0] * shared <= int(on_node):
        shared = 1  # srun has bound each task to its own CPUs
    return choose_threads(shared, asked, load=info.local_world_size == 1, before=before, environ=environ)


def die_with_parent() -> None:
    """Ask the Linux kernel to kill this process when its parent dies. An orphaned rank could save a checkpoint without
    holding the run folder's lock."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
