"""`run_local(fn, world_size, *args)`: call ``fn(*args)`` in real gloo processes of this machine, for every rank's result."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Ranks are forked from a server that has imported the slow things once and computed nothing: a fresh process for each
# call at a fraction of the cost of a new interpreter.
_CONTEXT = multiprocessing.get_context("forkserver")


class RankFailed(RuntimeError):
    """A rank raised, died or ran past the limit; the message has its traceback."""


def preload(modules: Sequence[str]) -> None:
    """Name what ranks need imported. Has an effect before the first `run_local` of this process only."""
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", *modules])


preload(["parallel.pipeline"])


def _run_rank(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
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
    partial = Path(folder) / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder) / f"{rank}.pkl")
    os._exit(0 if outcome[0] else 1)


def run_local(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Results by rank. ``fn`` must be importable. Raises RankFailed with the traceback of the first rank that failed;
    the others, who may wait for it for ever, are killed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_run_rank, args=(fn, rank, world_size, folder, args)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        failed = False
        while not failed and any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            for process in processes:
                process.join(0.02)
                failed = failed or process.exitcode not in (None, 0)
        if failed:
            time.sleep(0.2)  # whoever failed of itself, not for a lost peer, has written its result by then
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        outcomes = {}
        files = sorted(Path(folder).glob("*.pkl"), key=lambda file: file.stat().st_mtime_ns)
        for file in files:
            outcomes[int(file.stem)] = pickle.loads(file.read_bytes())
    failures = [text for good, text in outcomes.values() if not good]
    if failures:
        raise RankFailed(failures[0])
    if hung:
        raise RankFailed(f"ranks {hung} of {world_size} still ran after {timeout} s")
    missing = sorted(set(range(world_size)) - outcomes.keys())
    if missing:
        raise RankFailed(f"ranks {missing} of {world_size} died without a result")
    return [outcomes[rank][1] for rank in range(world_size)]
