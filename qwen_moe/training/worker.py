"""`python -m qwen_moe.training.worker CONFIG FAILURE_FILE` runs one process of a training run, from start-up to exit."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from launchers.job.decide import BAD_STEP, DISK, USER
from launchers.job.heartbeat import Heartbeat
from launchers.local.orphans import end_with_agent
from launchers.local.supervisor import USER_ERROR
from launchers.local.terminal import outlive_terminal
from qwen_moe.config import RunConfig, load_config
from qwen_moe.errors import PeerLost, UserError, explain_os_error


def report_failure(failure_file: Path, message: str, kind: str = USER) -> None:
    """Write the message for the supervisor. Only the first process that fails is reported."""
    temporary = failure_file.with_name(f"{failure_file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"message": message, "kind": kind}), encoding="utf-8")
        os.link(temporary, failure_file)
    except FileExistsError:
        pass  # another rank failed first
    except OSError:
        print(f"error: {message}", file=sys.stderr)  # the file could not be written


def run_worker(
    config: RunConfig,
    heart: Heartbeat | None = None,
    stop_signals: Sequence[int] = (),
    admit: Callable[[], None] | None = None,
) -> int:
    """Train in this process as the rank that the environment names. Returns `train`'s exit code. Raises UserError.
    ``admit``: rank 0 calls it when all ranks have arrived, before they begin; an exception in it ends all ranks."""
    import torch.distributed as dist

    from parallel.hang_watch import HangWatch
    from parallel.process import PeerError, ProcessError, own_threads, process_info, start
    from qwen_moe.runs.records import earlier_threads
    from qwen_moe.training.loop import train

    try:
        info = process_info()
        # The watch below ends a hung job first, with a better message than the process group's own limit.
        minutes = 1.5 * config.parallel.collective_timeout_minutes + 1
        threads = own_threads(info, config.launch.threads, earlier_threads(config.run_dir, info.world_size))
        os.environ |= threads.environment()  # for the attempt's record and for child processes
        if info.rank == 0:
            print(threads.text(), file=sys.stderr, flush=True)
        device = start(info, threads, timeout_minutes=minutes, admit=admit)
    except PeerError as error:
        raise PeerLost(str(error)) from None
    except ProcessError as error:
        raise UserError(str(error)) from None
    watch = HangWatch(
        config.run_dir / "hang", info.rank, info.world_size, 60 * config.parallel.collective_timeout_minutes
    )
    watch.start()
    try:
        return train(config, info, device, heart, stop_signals)
    finally:
        watch.stop()
        # Not after an error: other ranks may be inside a collective. The exit closes the sockets.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def main(config_path: Path, failure_file: Path) -> int:
    end_with_agent()
    outlive_terminal()
    config = load_config(config_path)
    try:
        return run_worker(config)
    except PeerLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        report_failure(failure_file, str(error), BAD_STEP if type(error).__name__ == "BadStep" else USER)
        return USER_ERROR
    except OSError as error:
        report_failure(failure_file, explain_os_error(error), DISK)
        return USER_ERROR
    except Exception:
        # If another rank has reported its failure, this error is most likely a broken connection to it.
        if not failure_file.exists():
            traceback.print_exc()
        return 1


def leave(code: int) -> NoReturn:
    """End this process at once, so that threads of gloo or of an asynchronous checkpoint cannot keep it alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
