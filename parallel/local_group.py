"""`run_local(fn, world_size, *args)` calls ``fn(*args)`` in real gloo processes and returns every rank's result."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel.atomic import write_bytes

# Ranks are forked from a server that has imported torch once and computed nothing. Each call gets fresh processes at a
# fraction of the cost of new interpreters.
_CONTEXT = multiprocessing.get_context("forkserver")


ECHO_SECONDS = 1.0  # after the first failure, the time in which other ranks may report theirs


class RankFailed(RuntimeError):
    """Ranks raised, died or ran past the limit. The message has their tracebacks; ``cause`` is a one-line summary."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


def preload(modules: Sequence[str]) -> None:
    """Name modules for the server to import. Call it before the first `run_local` of this process; later has no effect."""
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", *modules])


preload(["parallel.pipeline"])


def _run_rank(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    faulthandler.enable((Path(folder) / f"{rank}.fault").open("w"), all_threads=False)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    import torch
    import torch.distributed as dist

    from parallel.process import die_with_parent

    die_with_parent()
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        outcome = (True, fn(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = (False, traceback.format_exc())
    write_bytes(Path(folder) / f"{rank}.pkl", pickle.dumps(outcome))
    os._exit(0 if outcome[0] else 1)


def run_local(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Return the results by rank. ``fn`` must be importable. Raises RankFailed with every failed rank's traceback, root
    cause first. Ranks that still run, perhaps waiting for a lost rank, are killed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_run_rank, args=(fn, rank, world_size, folder, args)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        failed = False
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            for process in processes:
                process.join(0.02)
            if not failed and any(process.exitcode not in (None, 0) for process in processes):
                failed, deadline = True, min(deadline, time.monotonic() + ECHO_SECONDS)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        outcomes = {int(file.stem): pickle.loads(file.read_bytes()) for file in Path(folder).glob("*.pkl")}
        failures = []
        for rank, process in enumerate(processes):
            if rank in outcomes and not outcomes[rank][0]:
                text = outcomes[rank][1].strip()
                failures.append((f"rank {rank} of {world_size}: {text}", text.splitlines()[-1]))
            elif rank not in outcomes and rank not in hung:
                cause = f"rank {rank} of {world_size} died without a result ({_end(process.exitcode)})"
                fault = Path(folder) / f"{rank}.fault"
                failures.append((f"{cause}\n{fault.read_text() if fault.exists() else ''}", cause))
    if failures:
        failures.sort(
            key=lambda failure: "by peer" in failure[1]
        )  # an error about a lost peer follows from another failure
        raise RankFailed("\n".join(text for text, _ in failures), failures[0][1])
    if hung:
        cause = f"ranks {hung} of {world_size} still ran after {timeout} s"
        raise RankFailed(cause, cause)
    return [outcomes[rank][1] for rank in range(world_size)]


def _end(exitcode: int | None) -> str:
    return signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
