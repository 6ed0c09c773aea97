"""`python -m qwen_moe.launch.rank ATTEMPT LOCAL`: one rank of a launched run, with its log, stack, heartbeat and error
report."""

import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from launchers.folder.run_folder import Attempt, rank_name
from launchers.job.decide import BAD_STEP, CONNECTION, CRASH, DISK, USER
from launchers.job.evidence import describe_error
from launchers.job.heartbeat import Heartbeat
from launchers.local.orphans import end_with_agent
from launchers.local.signals import signal_number
from launchers.local.supervisor import INTERRUPTED, USER_ERROR


def take_output(path: Path) -> None:
    """Redirect all output of this process, also from C libraries, to ``path``, which the agent copies line by line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def share_of_cpus(local_rank: int, local_world_size: int) -> None:
    """Bind this process to its share of the node's CPUs, if there is at least one per process."""
    if not hasattr(os, "sched_getaffinity"):
        return
    cpus = sorted(os.sched_getaffinity(0))
    each = len(cpus) // local_world_size
    if each:
        os.sched_setaffinity(0, cpus[local_rank * each : (local_rank + 1) * each])


def main(folder: str, local: str) -> int:
    end_with_agent()
    attempt, rank = Attempt(Path(folder)), int(os.environ["RANK"])
    plan = attempt.read("plan.json")
    name = rank_name(rank)
    take_output(Path(local) / f"{name}.log")
    stacks = (attempt.folder / "stacks" / f"{name}.txt").open("a", encoding="utf-8")
    faulthandler.enable()  # after a crash in C, the log ends with its stack
    faulthandler.register(signal_number(plan["survive"]["stack_signal"]), file=stacks, all_threads=True)
    # Ignored until the training loop handles them: the conductor and the agent repeat their warning.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal_number(plan["survive"]["checkpoint_signal"]), signal.SIG_IGN)
    heart = Heartbeat(Path(local) / f"{name}.json", rank)
    share_of_cpus(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        code = _train(plan, attempt, heart, rank)
    except Exception as error:
        return _report_failure(attempt, rank, error)
    heart.phase("ended")
    return code


def _train(plan: dict, attempt: Attempt, heart: Heartbeat, rank: int) -> int:
    from qwen_moe.config import load_config
    from qwen_moe.training.worker import run_worker

    config = load_config(Path(plan["recipe"]))
    warning = signal_number(plan["survive"]["checkpoint_signal"])
    code = run_worker(config, heart, stop_signals=(warning,))
    if code not in (0, INTERRUPTED):
        return code
    if rank == 0:
        if code == 0:
            from qwen_moe.runs.finish import finish_run

            heart.phase("finishing")
            finish_run(config)
        attempt.write("outcome.json", {"outcome": "complete" if code == 0 else "stopped", "time": time.time()})
    return 0


def _report_failure(attempt: Attempt, rank: int, error: Exception) -> int:
    """Report why this rank failed; a user's error gets no traceback. Returns the exit code."""
    from qwen_moe.errors import PeerLost, UserError, explain_os_error

    now = time.time()
    kind, message = describe_error("".join(traceback.format_exception(error)))
    if type(error).__name__ == "BadStep":
        kind, message = BAD_STEP, str(error)
    elif isinstance(error, PeerLost):
        kind, message = CONNECTION, str(error)
    elif isinstance(error, UserError):
        kind, message = USER, str(error)
    elif isinstance(error, OSError) and kind in (DISK, CRASH):
        message = explain_os_error(error)
    if isinstance(error, UserError):
        print(f"error: {message}", file=sys.stderr)
    else:
        traceback.print_exc()
    host = os.environ.get("QWEN_MOE_NODE", "localhost")
    report = {"rank": rank, "host": host, "kind": kind, "message": message, "time": now}
    try:
        attempt.write(f"errors/{rank_name(rank)}.json", report)
    except OSError as problem:
        print(f"the report could not be written: {problem}", file=sys.stderr)
    return USER_ERROR if kind == USER else 1


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo or of a checkpoint being written must not keep a failed process alive
