"""A process that runs others under limits and ends them with all their descendants. Run as a script.

It imports nothing of ours, so that it starts quickly.

It reads requests from its standard input, a JSON object a line, and answers each with a line on its standard output:

* ``{"load": SPEC}``: import a function; answers its file. ``{"call": SPEC, "arguments": [...]}``: its value. Functions stay
  in one process (`function_child.py`), which is started again after one that did not answer.
* ``{"code": TEXT, "tests": [...]}``: run code and its tests in a new process (`code_child.py`), in an empty folder and with
  few environment variables.

Answers are ``{"value": ...}`` or ``{"kind": ..., "text": ...}`` for what went wrong. On Linux the process adopts orphans of
what it runs (PR_SET_CHILD_SUBREAPER), so that no descendant escapes it by starting a session of its own. When its parent
ends, it ends what runs, and itself.
"""

import contextlib
import ctypes
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LONGEST_ANSWER = 1 << 20  # bytes
LOADING_SECONDS = 300.0
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
_KILLING_SECONDS = 5.0

Reply = dict[str, object]


class NoAnswer(Exception):
    """A process did not answer. ``kind`` and the message say why."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Child:
    """A process with two pipes of its own: requests to it and its answers. Its standard input and output are not ours."""

    def __init__(self, command: list[str], folder: str, environment: dict[str, str] | None) -> None:
        requests, self._to = os.pipe()
        self._from, answers = os.pipe()
        self._rest = b""
        try:
            self._process = subprocess.Popen(
                [*command, str(requests), str(answers)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(requests, answers),
                start_new_session=True,
            )
        finally:
            os.close(requests)
            os.close(answers)

    def ask(self, request: Reply, seconds: float) -> Reply:
        """Send ``request`` and wait for the answer. Raises NoAnswer."""
        deadline = time.monotonic() + seconds
        self._send(json.dumps(request).encode() + b"\n", deadline, seconds)
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoAnswer("took too long", f"it took more than {seconds:g} second{'s' * (seconds != 1)}")
            readable, _, _ = select.select([self._from, 0], [], [], min(left, 1.0))
            if 0 in readable or os.getppid() != PARENT:
                raise SystemExit  # a request comes after the answer only, so this is the end of our parent
            if self._from in readable:
                found = os.read(self._from, 65536)
                if not found:
                    raise NoAnswer("died", self._how_it_ended())
                self._rest += found
                if len(self._rest) > LONGEST_ANSWER:
                    raise NoAnswer("gave no answer", "its answer is longer than 1 MiB")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise NoAnswer("gave no answer", "it wrote something else to the pipe of its answers")
        return answer

    def _send(self, data: bytes, deadline: float, seconds: float) -> None:
        os.set_blocking(self._to, False)
        while data:
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NoAnswer(
                        "took too long", f"it took more than {seconds:g} second{'s' * (seconds != 1)}"
                    ) from None
                select.select([], [self._to], [], 0.1)
            except BrokenPipeError:
                raise NoAnswer("died", self._how_it_ended()) from None

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed the pipe of its answers"
        if code == -signal.SIGXCPU:
            return "it used more processor time than allowed"
        if code < 0:
            return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"its process ended with exit code {code} before it answered"

    def end(self) -> None:
        """Kill the process and all descendants of this one."""
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(pipe)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        kill_descendants()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)


def descendants() -> set[int]:
    """Processes below this one that still run, by /proc. Empty where there is none."""
    children: dict[int, list[int]] = {}
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return set()
    for name in names:
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]  # the name before may hold anything
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(name))
    found: set[int] = set()
    left = [os.getpid()]
    while left:
        for child in children.get(left.pop(), ()):
            found.add(child)
            left.append(child)
    return found


def kill_descendants() -> None:
    """Stop all first, so that none starts another meanwhile, then kill them."""
    deadline = time.monotonic() + _KILLING_SECONDS
    while time.monotonic() < deadline:
        stopped: set[int] = set()
        while (fresh := descendants() - stopped) and time.monotonic() < deadline:
            for process in fresh:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGSTOP)
            stopped |= fresh
        if not stopped:
            break
        for process in stopped:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ChildProcessError):  # those that were adopted
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class Warden:
    def __init__(self, seconds: float, memory: int) -> None:
        self._seconds, self._limits = seconds, [str(memory), str(seconds)]
        self._functions: Child | None = None

    def answer(self, request: Reply) -> Reply:
        try:
            if "code" in request:
                return self._run(request)
            return self._call(request)
        except NoAnswer as error:
            return {"kind": error.kind, "text": str(error)}

    def end(self) -> None:
        if self._functions is not None:
            self._functions.end()
            self._functions = None
        kill_descendants()

    def _call(self, request: Reply) -> Reply:
        try:
            if self._functions is None:
                command = [sys.executable, os.path.join(HERE, "function_child.py"), *self._limits]
                self._functions = Child(command, os.getcwd(), FUNCTION_ENVIRONMENT)
            name = request.get("load", request.get("call"))
            loaded = self._functions.ask({"load": name}, LOADING_SECONDS)  # the import counts to no answer's time
            if "load" in request or "kind" in loaded:
                return loaded
            return self._functions.ask(request, self._seconds)
        except BaseException:
            self.end()
            raise

    def _run(self, request: Reply) -> Reply:
        with tempfile.TemporaryDirectory(prefix="qwen-moe-code-", ignore_cleanup_errors=True) as folder:
            environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
            environment |= {"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-I", os.path.join(HERE, "code_child.py"), *self._limits]
            child = Child(command, folder, environment)
            try:
                # Interpreters start slowly on a loaded machine, which is not the code's fault.
                child.ask({}, LOADING_SECONDS)
                nonce = secrets.token_hex(8)
                found = child.ask(request | {"nonce": nonce}, self._seconds)
            finally:
                child.end()
        if found.pop("nonce", None) != nonce:
            raise NoAnswer("gave no answer", "the code wrote to the pipe of the answers")
        return found


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    warden = Warden(seconds, memory)
    rest = b""
    try:
        while True:
            readable, _, _ = select.select([0], [], [], 1.0)
            if os.getppid() != PARENT:
                return
            if not readable:
                continue
            found = os.read(0, 1 << 20)
            if not found:
                return
            rest += found
            if rest.endswith(b"\n"):
                answer = warden.answer(json.loads(rest))
                rest = b""
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()
    finally:
        warden.end()


if __name__ == "__main__":
    PARENT = os.getppid()
    FUNCTION_ENVIRONMENT = os.environ | {"PYTHONHASHSEED": "0"}
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        FUNCTION_ENVIRONMENT[threads] = "1"
    main()
