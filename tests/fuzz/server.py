"""`Server.run(argv, folder)`: the `qwen-moe` command in a forked process with limits; one that hangs, eats memory or dies
is an answer as well. The server has imported what is slow once, so that a call costs what the command itself does.
"""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20.0
MORE_MEMORY = 4 << 30  # bytes of address space above what the server itself has
FILE_BYTES = 1 << 28
HEAVY = (
    "torch.distributed.launcher.api",
    "parallel.elastic",
    "qwen_moe.training.worker",
    "qwen_moe.training.loop",
    "qwen_moe.runs.finish",
    "qwen_moe.data.megatron",
    "qwen_moe.checkpoint.huggingface.convert",
    "qwen_moe.verify.ranks",
    "scaling_laws.report",
    "scaling_laws.plots",
    "transformers",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
)


@dataclass(frozen=True)
class Request:
    """One call of the command."""

    argv: list[str]
    folder: str
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = SECONDS
    limited: bool = True
    """Whether memory and the size of files are limited."""


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code (negative: the signal that ended it), what it said, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool
    cpu: float


class _Forked:
    """What `subprocess.Popen` gives the supervisor of `train`, for an agent that is forked from here."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        start_new_session: bool,
        preexec_fn: Callable[[], None],
        pass_fds: Sequence[int],
    ) -> None:
        nproc, config, failure = command[-3:]
        self.returncode: int | None = None
        self.pid = os.fork()  # with all descriptors, ``pass_fds`` too
        if self.pid:
            return
        code = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            if start_new_session:
                os.setsid()
            preexec_fn()
            os.environ.update(env)
            from qwen_moe.training.elastic import main

            code = main(int(nproc), config, failure)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.returncode = 1
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("train", timeout or 0)
            else:
                time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _popen(command: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(command, list) and "qwen_moe.training.elastic" in command:
        return _Forked(command, **kwargs)
    return subprocess.Popen(command, *args, **kwargs)


class _LocalSubprocess:
    """The module `subprocess` as launchers.local.supervisor sees it."""

    Popen = staticmethod(_popen)

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


def _limits() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY, size + MORE_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _child(request: Request, out: str, err: str) -> None:
    """The command, as the interpreter would end it. Does not return."""
    code = 1
    try:
        os.setsid()
        for path, number in ((out, 1), (err, 2), ("/dev/null", 0)):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.dup2(descriptor, number)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        os.chdir(request.folder)
        os.environ.update(request.environment)
        sys.argv = ["qwen-moe", *request.argv]
        if request.limited:
            _limits()
        import launchers.local.supervisor

        launchers.local.supervisor.subprocess = _LocalSubprocess()  # type: ignore[assignment]
        from qwen_moe.cli import main

        code = main(request.argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code if isinstance(code, int) else 0)


def _wait(pid: int, seconds: float) -> tuple[int, bool]:
    end, pause = time.monotonic() + seconds, 0.002
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), False
        time.sleep(pause)
        pause = min(0.05, pause * 1.3)
    os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), True


def _read(path: Path) -> str:
    return path.read_bytes()[-1_000_000:].decode("utf-8", "replace") if path.exists() else ""


def serve(modules: Sequence[str]) -> None:
    """Answer requests, a JSON object a line, until stdin ends."""
    import torch

    torch.set_num_threads(1)
    for name in modules:
        import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would otherwise copy every page of what was imported
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        with tempfile.TemporaryDirectory(prefix="qwen-moe-fuzz-") as folder:
            out, err = f"{folder}/out", f"{folder}/err"
            start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            pid = os.fork()
            if pid == 0:
                _child(request, out, err)
            code, timed_out = _wait(pid, request.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it may have left running
            said = [_read(Path(path)) for path in (out, err)]
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            answer = [code, *said, time.monotonic() - start, timed_out, cpu]
        print(json.dumps(answer), file=replies, flush=True)


class Server:
    """``modules``: what is imported before the first call, beside torch."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self.home = tempfile.mkdtemp(prefix="qwen-moe-fuzz-home-")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "HOME": self.home,
            "XDG_CONFIG_HOME": f"{self.home}/none",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID", "SLURM_PROCID"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "tests.fuzz.server", *modules]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the server of the fuzz did not start"

    def run(
        self, argv: Sequence[str], folder: Path, seconds: float = SECONDS, limited: bool = True, **environment: str
    ) -> Answer:
        """`qwen-moe ARGV` in ``folder``; ended after ``seconds``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request: dict[str, Any] = {"argv": list(argv), "folder": str(folder), "environment": environment}
        request |= {"seconds": seconds, "limited": limited}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Answer(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        shutil.rmtree(self.home, ignore_errors=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
