"""`python -m qwen_moe.training.worker CONFIG`: one process of a training run, from start-up to exit code."""

import json
import os
import sys
import traceback
from pathlib import Path

from launchers.local import FAILURE
from qwen_moe.config import RunConfig, load_config
from qwen_moe.errors import UserError


def report_failure(run_dir: Path, message: str) -> None:
    """Leave the message for the supervisor; the first process to fail is the one that is reported."""
    temporary = run_dir / f"{FAILURE}.{os.getpid()}"
    temporary.write_text(json.dumps({"message": message}), encoding="utf-8")
    try:
        os.link(temporary, run_dir / FAILURE)
    except FileExistsError:
        pass  # another rank failed first and is the one to be reported
    finally:
        temporary.unlink()


def run_worker(config: RunConfig) -> int:
    """Train in this process as the rank that the environment says. Exit code: 0 done or stopped orderly, 2 user error."""
    import torch.distributed as dist

    from parallel.process import ProcessError, process_info, start
    from qwen_moe.training.loop import train

    try:
        info = process_info()
        device = start(info, config.launch.threads)
    except ProcessError as error:
        raise UserError(str(error)) from None
    try:
        return train(config, info, device)
    finally:
        # Not destroyed after an error: the others may be inside a collective, and the exit closes the sockets.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def main(path: str) -> int:
    config = load_config(Path(path))
    try:
        return run_worker(config)
    except UserError as error:
        report_failure(config.run_dir, str(error))
        return 2
    except OSError as error:
        report_failure(config.run_dir, f"{error}")
        return 2
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo or of a checkpoint in flight must not keep a failed process alive.
    os._exit(code)
