"""The lock of a run folder: only one run at a time works there. The kernel releases it when every holder has ended."""

import errno
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launchers.errors import LaunchError

try:
    import fcntl
except ImportError:  # Windows has no flock; runs are then not locked
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
# A process that only asks whether the folder is locked (`locked`) holds the lock for an instant.
_TRIES, _PAUSE_SECONDS = 5, 0.05
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder that the lock file names. ``pid`` is 0 and the strings are empty if it does not say."""

    pid: int = 0
    host: str = ""
    what: str = ""

    def text(self) -> str:
        """`process 12 on node3 (qwen-moe train)`"""
        if not self.pid:
            return "an unknown process (the lock file does not say which)"
        what = f" ({self.what})" if self.what else ""
        return f"process {self.pid}" + (f" on {self.host}" if self.host else "") + what


def read_holder(run_dir: Path) -> Holder:
    """The holder of a run folder's lock."""
    return holder_of(run_dir / NAME)


def holder_of(path: Path) -> Holder:
    """Reads `PID HOST WHAT`, or the pid alone, from a lock file; any other content means an unknown holder."""
    try:
        words = path.read_text(encoding="utf-8", errors="replace").strip().split(" ", 2)
    except OSError:
        return Holder()
    if not words[0].isascii() or not words[0].isdigit() or len(words[0]) > 10:
        return Holder()
    host, what = [*words[1:], "", ""][:2]
    return Holder(pid=int(words[0]), host=host, what=what)


def write_holder(file: IO[str], what: str = "") -> None:
    """Let a lock file, open for appending, name this process."""
    file.truncate(0)
    file.write(f"{os.getpid()} {socket.gethostname()} {what or _this_command()}\n")
    file.flush()


class RunLock:
    """An exclusive lock on a run folder. The kernel releases it when this process, and every process that was started with
    ``pass_fds=lock.pass_fds``, has ended in any way. Raises LaunchError, which names the holder.

    Processes of a killed run stop a moment later. The constructor waits for them, at most ``patience`` seconds.

    On NFS the kernel takes the lock on the server, so other nodes see it. If the file system has no locks, a note is
    printed.
    """

    def __init__(self, run_dir: Path, what: str = "", patience: float = 60) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir.absolute() / NAME
        self._file = self._path.open("a+", encoding="utf-8")
        if fcntl is None:
            return
        try:
            self._take(run_dir, patience)
        except BaseException:
            self._file.close()
            raise
        write_holder(self._file, what)

    def _take(self, run_dir: Path, patience: float) -> None:
        for _ in range(_TRIES):
            if self._try(run_dir):
                return
            time.sleep(_PAUSE_SECONDS)
        end, told = time.monotonic() + patience, False
        while time.monotonic() < end:
            left = _left_by_dead_holder(run_dir)  # before the try, so that a process that ends in between is not missed
            if self._try(run_dir):
                return
            if not left:
                break
            if not told:
                print(f"waiting for what an earlier run in {run_dir} left behind: {_processes(left)}", file=sys.stderr)
                told = True
            time.sleep(10 * _PAUSE_SECONDS)  # each look reads all of /proc
        raise LaunchError(
            f"run folder {run_dir} is in use by {_who_holds(run_dir)}: wait for it, stop it, or use another run_dir"
        )

    def _try(self, run_dir: Path) -> bool:
        """True if we hold the lock, or if this file system has no locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            print(
                f"note: {run_dir} cannot be locked ({error.strerror}): do not start a second run in it",
                file=sys.stderr,
            )
        return True

    @property
    def pass_fds(self) -> tuple[int, ...]:
        """Pass these to `subprocess.Popen`: the child then holds the lock too, until it ends."""
        return (self._file.fileno(),)

    def lost(self) -> str:
        """Why the lock no longer protects the run folder; "" while it does. A run that went on would make the folder anew,
        or write into that of a later run."""
        try:
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return ""
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # the file system does not answer now
            return ""
        return (
            f"run folder {self._path.parent} was deleted, moved or replaced while the run wrote to it, so the run was "
            "stopped: move it back and run the same command again to go on, or run it again to start anew"
        )

    def close(self) -> None:
        self._file.close()


def locked(run_dir: Path) -> bool:
    """True if a process on this machine (or on another one, if the file system shares locks) holds the run."""
    if fcntl is None:
        return False
    try:
        file = (run_dir / NAME).open("rb")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _HELD
    return False


def _this_command() -> str:
    name = Path(sys.argv[0]).name or "python"
    words = ["qwen-moe" if name == "__main__.py" else name, *sys.argv[1:2]]
    return " ".join(words).replace("\n", " ")[:60]


def _who_holds(run_dir: Path) -> str:
    """The holder that the lock file names; if it is dead, also the processes that it left running."""
    holder = read_holder(run_dir)
    left = _left_by_dead_holder(run_dir)
    if not left:
        return holder.text()
    return f"{holder.text()}, which has ended, and by what it started, which is still stopping ({_processes(left)})"


def _left_by_dead_holder(run_dir: Path) -> list[int]:
    """Pids that still hold the lock of a dead holder on this machine; empty if the holder is alive."""
    holder = read_holder(run_dir)
    if not holder.pid or holder.host not in ("", socket.gethostname()) or Path(f"/proc/{holder.pid}").exists():
        return []
    return _open_in(run_dir / NAME)


def users_of(path: Path) -> str:
    """The other processes of this machine that have a file open, for a message."""
    return _processes(found) if (found := _open_in(path)) else "another process"


def _processes(pids: list[int]) -> str:
    return ("process " if len(pids) == 1 else "processes ") + ", ".join(map(str, pids))


def _open_in(path: Path) -> list[int]:
    """Pids of this machine's processes that have the file open, if this user may see them (Linux)."""
    try:
        wanted = path.stat()
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    except OSError:
        return []
    found = []
    for pid in pids:
        try:
            entries = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue  # belongs to another user, or has ended
        for entry in entries:
            try:
                seen = entry.stat()
            except OSError:
                continue
            if (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino) and pid != os.getpid():
                found.append(pid)
                break
    return sorted(found)
