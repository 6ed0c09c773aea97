"""Per-node monitor: records heartbeats, deaths, log lines and stacks of the node's ranks in the run folder."""

import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from launchers.folder.run_folder import Attempt, rank_name, read_json

LOOK_SECONDS = 0.3
REPORT_SECONDS = 2.0
STACK_SECONDS = 1.5
REPEAT_SECONDS = 10.0


def process_state(pid: int) -> str:
    """The kernel's letter: R, S, D, T (stopped), Z; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


class LogShipper:
    """Copies a rank's growing output file line by line, and adds the time at which it saw each line."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self._offset, self._rest = 0, b""

    def ship(self, last: bool = False) -> None:
        try:
            with self.source.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        self._offset += len(data)
        # A progress bar returns to the start of its line; each of its states becomes a line here.
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if last and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        lines = [line for line in lines if line.strip()]
        if lines:
            now = datetime.now().isoformat(timespec="milliseconds")
            with self.target.open("a", encoding="utf-8") as file:
                file.writelines(f"{now} {line.decode('utf-8', errors='replace')}\n" for line in lines)


class NodeWatch(threading.Thread):
    """Monitors the ranks of ``host`` until `close`. ``local`` is the folder on the node's disk that they write to."""

    def __init__(self, attempt: Attempt, host: str, local: Path, stack_signal: int) -> None:
        super().__init__(daemon=True)
        self.attempt, self.host, self.local, self.stack_signal = attempt, host, local, stack_signal
        self._shippers: dict[str, LogShipper] = {}
        self._ranks: dict[int, dict[str, Any]] = {}
        self._first_death: dict[str, Any] | None = None
        self._stacks: dict[int, str] = {}
        self._asked_at = 0.0
        self._sizes: dict[int, int] = {}
        self._reported = 0.0
        self._requests: list[Callable[[], None]] = []
        self._stop_signal, self._stop_sent = 0, 0.0
        self._over = threading.Event()

    # -------------------------------------------------- called from signal handlers: they only record requests

    def request_stacks(self) -> None:
        self._requests.append(self._ask_stacks)

    def request_forward(self, number: int) -> None:
        self._requests.append(lambda: self._signal_ranks(number))

    def request_stop(self, number: int) -> None:
        """Send signal ``number`` to the ranks, again and again: those that still start do not listen yet."""
        self._stop_signal = number

    # -------------------------------------------------- the thread

    def run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                self._look()
            except OSError as error:  # a full or slow disk must not end the monitor; the agent's log shows the error
                print(f"watch: {error}", flush=True)

    def close(self) -> None:
        """Look once more and write everything that remains."""
        self._over.set()
        if self.is_alive():
            self.join(timeout=30)
        try:
            self._look(last=True)
        except OSError as error:
            print(f"watch: {error}", flush=True)

    def death(self) -> dict[str, Any] | None:
        """The first rank of this node that was seen dead: rank, pid and time."""
        return self._first_death

    def _look(self, last: bool = False) -> None:
        while self._requests:
            self._requests.pop(0)()
        if self._stop_signal and time.monotonic() - self._stop_sent > REPEAT_SECONDS:
            self._stop_sent = time.monotonic()
            self._signal_ranks(self._stop_signal)
        for path in self.local.glob("rank-*.json"):
            state = read_json(path)
            if state is not None:
                self._ranks[state["rank"]] = state | {"state": process_state(state["pid"])}
        self._note_deaths()
        for path in self.local.glob("rank-*.log"):
            shipper = self._shippers.setdefault(
                path.stem, LogShipper(path, self.attempt.folder / "ranks" / f"{path.stem}.log")
            )
            shipper.ship(last)
        collected = bool(self._asked_at) and time.monotonic() - self._asked_at > STACK_SECONDS
        if collected or (last and self._asked_at):
            self._collect_stacks()
        if last or collected or time.monotonic() - self._reported > REPORT_SECONDS:
            self._report(last)

    def _note_deaths(self) -> None:
        if self._first_death is not None:
            return
        for rank, state in sorted(self._ranks.items()):
            if state["state"] in ("", "Z") and state["phase"] != "ended":
                self._first_death = {"rank": rank, "pid": state["pid"], "time": time.time(), "step": state["step"]}
                self._ask_stacks()  # the other ranks wait for it and will soon be stopped: record what they are doing
                self._report(False)
                return

    def _signal_ranks(self, number: int) -> None:
        for state in self._ranks.values():
            if state["phase"] != "ended" and process_state(state["pid"]) not in ("", "Z"):
                try:
                    os.kill(state["pid"], number)
                except ProcessLookupError:
                    continue

    def _stack_size(self, rank: int) -> int:
        path = self.attempt.folder / "stacks" / f"{rank_name(rank)}.txt"
        return path.stat().st_size if path.exists() else 0

    def _ask_stacks(self) -> None:
        if self._asked_at or self._stacks:
            return  # once is enough, because the decision follows
        self._sizes = {rank: self._stack_size(rank) for rank in self._ranks}
        self._asked_at = time.monotonic()
        self._signal_ranks(self.stack_signal)

    def _collect_stacks(self) -> None:
        self._asked_at = 0.0
        for rank, before in self._sizes.items():
            state = process_state(self._ranks[rank]["pid"])
            if state in ("", "Z"):
                self._stacks[rank] = "dead"
            else:
                self._stacks[rank] = "answered" if self._stack_size(rank) > before else "silent"

    def _report(self, ended: bool) -> None:
        self._reported = time.monotonic()
        self.attempt.write(
            f"nodes/{self.host}.json",
            {
                "host": self.host,
                "time": time.time(),
                "ended": ended,
                "ranks": {str(rank): state for rank, state in sorted(self._ranks.items())},
                "death": self._first_death,
                "stacks": {str(rank): answer for rank, answer in sorted(self._stacks.items())},
            },
        )
