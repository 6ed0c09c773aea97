"""`run_distributed(fn, world_size, *args)`: call ``fn(*args)`` in real gloo processes and return every rank's result."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ranks are forked from a server that has imported the slow things once and computed nothing: a fresh process for each
# test at a fraction of the cost of a new interpreter.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "qwen_moe.training.step",
        "hypothesis",
        "pytest",
    ]
)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(
    fn: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        outcome = (True, fn(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = (False, traceback.format_exc())
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    os._exit(0 if outcome[0] else 1)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Results by rank. Raises AssertionError with the traceback of the first rank that failed. ``fn`` must be importable."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_run_rank, args=(fn, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        outcomes = {}
        for rank in range(world_size):
            file = Path(folder) / f"{rank}.pkl"
            outcomes[rank] = (
                pickle.loads(file.read_bytes()) if file.exists() else (False, f"rank {rank} left no result")
            )
    assert not hung, f"ranks {hung} still ran after {timeout} s"
    failures = [text for good, text in outcomes.values() if not good]
    assert not failures, failures[0]
    return [outcomes[rank][1] for rank in range(world_size)]
