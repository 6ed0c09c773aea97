"""Many commands at a time: order, retries, what is given up, stopping, going on; with workers that take milliseconds."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launchers.local.fleet import Fleet, Result, Task

# Notes when it starts and ends, fails as often as the file `fail` says, and is done when its file is there.
WORKER = """
    import pathlib, sys, time
    folder, name, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[4])
    with open(folder / "log.txt", "a") as log:
        log.write(f"+{name}\\n")
    time.sleep(float(sys.argv[3]))
    tries = folder / f"{name}.tries"
    left = int(tries.read_text()) if tries.exists() else 0
    if left:
        tries.write_text(str(left - 1))
        print("error: it went wrong", file=sys.stderr)
        sys.exit(code)
    (folder / f"{name}.done").write_text("")
    with open(folder / "log.txt", "a") as log:
        log.write(f"-{name}\\n")
"""


def task(folder: Path, name: str, *, seconds: float = 0.05, after: str = "", code: int = 1, **more: Any) -> Task:
    return Task(
        name=name,
        command=(sys.executable, "-c", textwrap.dedent(WORKER), str(folder), name, str(seconds), str(code)),
        log=folder / f"{name}.log",
        complete=lambda: (folder / f"{name}.done").exists(),
        busy=more.get("busy", lambda: False),
        progress=lambda: (0.5, "half"),
        after=after,
    )


def fleet(tasks: list[Task], parallel: int = 1, retries: int = 0) -> Fleet:
    return Fleet(tasks, parallel=parallel, retries=retries, environment=os.environ)


def history(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().split()


def test_order_and_what_is_complete_already(tmp_path: Path) -> None:
    (tmp_path / "b.done").write_text("")
    tasks = [task(tmp_path, "branch", after="trunk"), task(tmp_path, "b"), task(tmp_path, "trunk")]
    assert set(fleet(tasks, parallel=3).run().values()) == {Result(state="complete")}
    assert history(tmp_path) == ["+trunk", "-trunk", "+branch", "-branch"]


def test_no_more_than_asked_at_a_time(tmp_path: Path) -> None:
    fleet([task(tmp_path, name, seconds=0.5) for name in "abcd"], parallel=2).run()
    running = most = 0
    for line in history(tmp_path):
        running += 1 if line[0] == "+" else -1
        most = max(most, running)
    assert most == 2 and len(history(tmp_path)) == 8


def test_retries_have_a_limit_and_a_failed_trunk_blocks_its_branches_only(tmp_path: Path) -> None:
    (tmp_path / "trunk.tries").write_text("2")
    (tmp_path / "lucky.tries").write_text("1")
    names = {"trunk": "", "branch": "trunk", "twig": "branch", "lucky": ""}
    found = fleet([task(tmp_path, name, after=after) for name, after in names.items()], retries=1).run()
    assert [result.state for result in found.values()] == ["failed", "blocked", "blocked", "complete"]
    assert found["trunk"].why == "it went wrong" and "trunk did not complete" in found["branch"].why
    assert history(tmp_path).count("+trunk") == 2 and history(tmp_path).count("+lucky") == 2


def test_an_error_that_another_attempt_would_meet_again_is_not_retried(tmp_path: Path) -> None:
    (tmp_path / "a.tries").write_text("1")
    assert fleet([task(tmp_path, "a", code=2)], retries=5).run()["a"].state == "failed"
    assert history(tmp_path) == ["+a"]


def test_a_run_that_another_process_works_on_is_waited_for(tmp_path: Path) -> None:
    free_at = time.monotonic() + 1.0
    found = fleet([task(tmp_path, "a", busy=lambda: time.monotonic() < free_at), task(tmp_path, "b")]).run()
    assert {result.state for result in found.values()} == {"complete"}
    assert history(tmp_path) == ["+b", "-b", "+a", "-a"]


def test_an_interrupt_stops_all_and_the_same_call_goes_on(tmp_path: Path) -> None:
    def interrupt_when_two_run() -> None:
        while not (tmp_path / "log.txt").exists() or len(history(tmp_path)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_two_run).start()
    names = ("a", "b", "c")
    started = time.monotonic()
    found = fleet([task(tmp_path, name, seconds=60) for name in names], parallel=2).run()
    assert time.monotonic() - started < 20
    assert [result.state for result in found.values()] == ["stopped"] * 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = fleet([task(tmp_path, name) for name in names], parallel=2).run()
    assert [result.state for result in again.values()] == ["complete"] * 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux is asked")
def test_when_the_fleet_is_killed_its_commands_end(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from tests.launchers.local.test_fleet import fleet, task
        fleet([task(Path({str(tmp_path)!r}), "a", seconds=60)]).run()
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "log.txt").exists():
        assert time.monotonic() < end and holder.poll() is None
        time.sleep(0.05)
    (child,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    holder.kill()
    holder.wait()
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not (tmp_path / "a.done").exists()


def test_an_interrupt_while_a_command_is_being_started_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def start(*args: Any, **options: Any) -> Any:
        process = real(*args, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    started = time.monotonic()
    assert fleet([task(tmp_path, "a", seconds=60)]).run()["a"].state == "stopped"
    assert time.monotonic() - started < 20
