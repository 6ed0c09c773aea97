"""`python -m qwen_moe.launch.agent ATTEMPT train|bandwidth`: one torchrun agent per node, with a monitor of its ranks.

It uses the same elastic agent as the `torchrun` command, with a static rank from plan.json. Signals that are meant for its
ranks would kill torchrun; this agent passes them on instead.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from launchers.folder.run_folder import Attempt
from launchers.job.cluster import own_node_name
from launchers.job.node_watch import NodeWatch
from launchers.local.orphans import AGENT_PID
from launchers.local.signals import signal_number
from parallel.heap import heap_environment
from parallel.threads import Threads, choose_threads
from qwen_moe.runs.records import earlier_threads

_NO_SIGNAL = "none"  # torch's agent would kill the ranks some seconds after a signal
_MODULES = {"train": "qwen_moe.launch.rank", "bandwidth": "qwen_moe.launch.bandwidth"}


def _listen(watch: NodeWatch, plan: dict[str, Any]) -> None:
    """Pass the warning on to the ranks, and ask them for stacks on the stack signal. Slurm sends SIGTERM to ranks itself.
    SIGINT reaches an agent alone (`scancel --signal=INT`) and means a warning, too. The conductor does not see it, and so
    does not repeat it."""
    warning, stacks = (signal_number(plan["survive"][f"{name}_signal"]) for name in ("checkpoint", "stack"))

    def forward(number: int, frame: FrameType | None) -> None:
        watch.request_forward(number)

    def stop(number: int, frame: FrameType | None) -> None:
        watch.request_stop(warning)

    def ask(number: int, frame: FrameType | None) -> None:
        watch.request_stacks()

    def kill_all(number: int, frame: FrameType | None) -> None:
        watch.request_forward(signal.SIGKILL)
        watch.close()
        os._exit(128 + number)

    signal.signal(warning, forward)
    signal.signal(signal.SIGINT, stop)
    signal.signal(stacks, ask)
    signal.signal(signal.SIGTERM, kill_all if plan["local"] else signal.SIG_IGN)


def _launch(plan: dict[str, Any], node_rank: int, module: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Run the ranks of this node to their end. Returns what elastic saw of failed ranks; empty if none failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from parallel.elastic import launch_config

    logging.disable(logging.CRITICAL)  # the conductor reports failures, root cause first
    nodes = len(plan["nodes"])
    launch = launch_config(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=plan["processes_per_node"],
        run_id=f"{plan['job'] or 'local'}-{plan['attempt']}-{module.rpartition('.')[2]}",
        rdzv_backend="static",
        rdzv_endpoint=f"{plan['address']}:{plan['port'] + (module != _MODULES['train'])}",
        rdzv_configs={"rank": node_rank, "timeout": 900},
        max_restarts=0,  # the conductor restarts, because it knows whether there was progress
        monitor_interval=1.0,
        shutdown_timeout=10,
        signals_to_handle=_NO_SIGNAL,
    )
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        return [
            {"rank": rank, "exit_code": failure.exitcode, "time": float(failure.timestamp), "pid": failure.pid}
            for rank, failure in error.failures.items()
        ]
    return []


def _threads(attempt: Attempt, plan: dict[str, Any]) -> Threads:
    """Choose the CPU threads before the ranks run, because each rank would see the others' start as load."""
    from qwen_moe.config import load_config

    each = plan["processes_per_node"]
    run_dir = attempt.folder.parents[2]
    before = earlier_threads(run_dir, each * len(plan["nodes"]))
    return choose_threads(each, load_config(Path(plan["recipe"])).launch.threads, before=before)


def main(folder: str, stage: str) -> int:
    attempt = Attempt(Path(folder))
    plan = attempt.read("plan.json")
    host = own_node_name(os.environ)
    local = Path(tempfile.mkdtemp(prefix="qwen-moe-", dir=plan["local_folder"]))
    watch = NodeWatch(attempt, host, local, signal_number(plan["survive"]["stack_signal"]))
    os.environ["QWEN_MOE_NODE"] = host
    os.environ[AGENT_PID] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _NO_SIGNAL
    _listen(watch, plan)
    try:
        if stage == "train":
            os.environ |= _threads(attempt, plan).environment() | heap_environment()
            watch.start()
        failures = _launch(plan, plan["nodes"].index(host), _MODULES[stage], [folder, str(local)])
        if failures and stage == "train":
            death = watch.death()
            for failure in failures:
                if death is not None and failure["rank"] == death["rank"]:
                    failure["time"] = death["time"]
            try:
                attempt.write(f"failures/{host}.json", failures)
            except OSError as error:  # a full disk; the conductor looks for it
                print(f"the failures could not be written: {error}", flush=True)
            time.sleep(2)  # wait for stacks that are being written
        return 1 if failures else 0
    finally:
        if stage == "train":
            watch.close()
        shutil.rmtree(local, ignore_errors=True)


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    os._exit(code)  # a torch thread must not keep a failed node busy
