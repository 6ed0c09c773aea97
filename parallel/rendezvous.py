"""Rendezvous of a run's processes before anything else: who has arrived, who is missing, and whether rank 0 admits them."""

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

SAY_SECONDS = 15.0  # a process that has waited this long prints a note, and another every minute
PATIENCE_SECONDS = 600.0
_LOOK_SECONDS = 0.5


class MeetingError(ValueError):
    """The processes of the run did not all arrive; the message names the missing ranks, or says why rank 0 refused."""


def meet(
    rank: int, world_size: int, *, patience: float = PATIENCE_SECONDS, admit: Callable[[], None] | None = None
) -> dist.Store:
    """Return a store that all processes have joined. Rank 0 calls ``admit`` when all ranks have arrived. An exception in
    ``admit`` is raised on rank 0, and as a MeetingError with the same text on every other rank.

    Raises MeetingError after ``patience`` seconds, naming the missing ranks. Prints a note long before that.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + patience
    store = _open(host, port, rank, world_size, end)
    store.set(f"came/{rank}", socket.gethostname())
    if rank == 0:
        _wait_for_all(store, world_size, end, patience)
        try:
            if admit is not None:
                admit()
        except Exception as error:
            store.set("verdict", f"no {error}")
            time.sleep(2 * _LOOK_SECONDS)  # the store ends with this process: let the others read the verdict
            raise
        store.set("verdict", "yes")
        return dist.PrefixStore("run", store)
    verdict = _verdict(store, rank, host, port)
    if verdict != "yes":
        raise MeetingError(verdict.removeprefix("no "))
    return dist.PrefixStore("run", store)


def _open(host: str, port: int, rank: int, world_size: int, end: float) -> dist.Store:
    """Open torchrun's store, or one that rank 0 serves; other ranks retry until it is up."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not agent:
        try:
            return dist.TCPStore(host, port, world_size, True, timedelta(minutes=5), False, multi_tenant=True)
        except (RuntimeError, ValueError) as error:
            raise MeetingError(
                f"rank 0 cannot listen on {host}:{port} ({_first_line(error)}): is another run using it? Set MASTER_PORT "
                "to a free port"
            ) from None
    start, said = time.monotonic(), 0.0
    while True:
        try:
            # Where nobody listens yet, torch would print its stack again and again.
            socket.create_connection((host, port), timeout=SAY_SECONDS).close()
            store = dist.TCPStore(host, port, world_size, False, timedelta(seconds=SAY_SECONDS), False)
            store.set_timeout(timedelta(minutes=5))
            return (
                dist.PrefixStore(f"meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
                if agent
                else store
            )
        except (OSError, RuntimeError, ValueError) as error:
            now = time.monotonic()
            if now > end:
                raise MeetingError(
                    f"rank {rank} of {world_size} waited {now - start:.0f} s for rank 0 at {host}:{port}, and it did not "
                    f"come ({_first_line(error)}): was it started, and can this node ({socket.gethostname()}) reach it?"
                ) from None
            if now - start > SAY_SECONDS and now - said > 60:
                said = now
                waited = f"rank {rank} of {world_size} waits for rank 0 at {host}:{port} since {now - start:.0f} s"
                _say(f"{waited}. {_advice()}")
            time.sleep(_LOOK_SECONDS)


def _wait_for_all(store: dist.Store, world_size: int, end: float, patience: float) -> None:
    start, said = time.monotonic(), None
    missing = list(range(world_size))
    while True:
        missing = [rank for rank in missing if not store.check([f"came/{rank}"])]
        if not missing:
            return
        now = time.monotonic()
        text = (
            f"{world_size} processes belong to this run ({_where_from()}), and {world_size - len(missing)} came; "
            f"missing: rank {_short(missing)}"
        )
        if now > end:
            raise MeetingError(f"{text} after {patience:.0f} s. {_advice()}")
        if now - start > SAY_SECONDS and (said is None or now - said > 60):
            said = now
            _say(f"{text}. Waiting until {end - start:.0f} s have passed. {_advice()}")
        time.sleep(_LOOK_SECONDS / 5 if now - start < 2 else _LOOK_SECONDS)


def _verdict(store: dist.Store, rank: int, host: str, port: int) -> str:
    try:
        while not store.check(["verdict"]):  # ends when rank 0 decides or runs out of patience
            time.sleep(_LOOK_SECONDS / 5)
        return store.get("verdict").decode("utf-8", errors="replace")
    except RuntimeError:
        raise MeetingError(
            f"rank 0 at {host}:{port} ended before rank {rank} could join it; its own message says why"
        ) from None


def _where_from() -> str:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun's WORLD_SIZE"
    if "SLURM_STEP_ID" in os.environ and "WORLD_SIZE" not in os.environ:
        return f"the Slurm step {os.environ.get('SLURM_JOB_ID', '?')}.{os.environ['SLURM_STEP_ID']} has so many tasks"
    return "WORLD_SIZE"


def _advice() -> str:
    if "SLURM_STEP_ID" in os.environ and "WORLD_SIZE" not in os.environ:
        return (
            "Start the command itself with `srun --ntasks=N qwen-moe train ...`, so that every task runs it; inside an "
            "interactive `srun --pty` shell, `unset SLURM_STEP_NUM_TASKS` first"
        )
    return "Start the same command for every rank, or `unset RANK WORLD_SIZE` if an earlier job left them in this shell"


def _short(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
