"""The supervisor: restarts after crashes while there is progress, reports errors once, stops in order, locks the folder."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.errors import LaunchError
from launchers.local.lock import RunLock
from launchers.local.supervisor import INTERRUPTED, Outcome, Supervisor


def supervise(tmp_path: Path, script: str, limit: int = 2) -> Outcome:
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    return Supervisor(command, tmp_path, tmp_path / "failure.json", os.environ, limit).run()


# A worker that advances by one step per life and is killed by its own hand until it has done five.
CRASHING = """
    import os, pathlib, signal, sys
    progress = pathlib.Path(sys.argv[1]) / "progress"
    step = int(progress.read_text()) if progress.exists() else 0
    if step == 5:
        sys.exit(0)
    progress.write_text(str(step + 1))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_crashes_with_progress_are_restarted_without_limit(tmp_path: Path) -> None:
    assert supervise(tmp_path, CRASHING, limit=0) == Outcome(code=0, restarts=5)


def test_crashes_without_progress_end_the_run(tmp_path: Path) -> None:
    outcome = supervise(tmp_path, "import sys; sys.exit(3)", limit=2)
    assert outcome.code == 1 and outcome.restarts == 2
    assert "3 times in a row" in outcome.message


def test_an_error_of_the_worker_is_passed_on_and_not_retried(tmp_path: Path) -> None:
    script = """
        import json, pathlib, sys
        (pathlib.Path(sys.argv[1]) / "failure.json").write_text(json.dumps({"message": "top-k is too large"}))
        sys.exit(2)
    """
    assert supervise(tmp_path, script) == Outcome(code=2, restarts=0, message="top-k is too large")


def test_exit_code_2_is_an_error_of_the_worker_too(tmp_path: Path) -> None:
    """A worker that has nowhere to leave its message says it on stderr."""
    assert supervise(tmp_path, "import sys; sys.exit(2)") == Outcome(code=2, restarts=0)


def test_a_stale_failure_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text('{"message": "old"}')
    assert supervise(tmp_path, "").code == 0


WAITING = """
    import pathlib, signal, sys, time
    folder = pathlib.Path(sys.argv[1])
    def stop(*_):
        (folder / "saved").write_text("yes")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").write_text("")
    time.sleep(60)
"""


def interrupt_when_ready(folder: Path) -> None:
    def interrupt() -> None:
        while not (folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()


def test_an_interrupt_lets_the_worker_save_first(tmp_path: Path) -> None:
    interrupt_when_ready(tmp_path)
    assert supervise(tmp_path, WAITING).code == INTERRUPTED
    assert (tmp_path / "saved").exists()


# It said "saving a checkpoint" of a run that had not begun its first step, and nothing after that.
@pytest.mark.parametrize("saves", [False, True])
def test_a_stop_says_whether_anything_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saves: bool
) -> None:
    (tmp_path / "progress").write_text("yes")  # of an earlier start
    interrupt_when_ready(tmp_path)
    assert supervise(tmp_path, WAITING.replace('"saved"', '"progress"') if saves else WAITING).code == INTERRUPTED
    said = capsys.readouterr().err
    assert "stopping: a step that has begun is completed and saved (interrupt again to stop at once)" in said
    assert ("stopped before a new checkpoint was saved: the same command starts where this one did" in said) == (
        not saves
    )


def test_a_run_folder_has_one_run_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from launchers.local.lock import RunLock\n"
    script += "lock = RunLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"locked"
    with pytest.raises(LaunchError, match=str(holder.pid)):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    RunLock(tmp_path).close()


def test_what_a_killed_command_started_ends_and_holds_the_lock_until_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = "import pathlib, signal, sys, time; signal.signal(15, lambda *_: (time.sleep(4), sys.exit()))"
    child += "; pathlib.Path(sys.argv[1], 'ready').touch(); time.sleep(60)"
    script = f"""
        import os, sys
        from pathlib import Path
        from launchers.local.lock import RunLock
        from launchers.local.supervisor import Supervisor
        folder = Path(sys.argv[1])
        lock = RunLock(folder, "a test")
        Supervisor([sys.executable, "-c", {child!r}, str(folder)], folder, folder / "f", os.environ, 0, lock).run()
    """
    command = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)])
    end = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    command.kill()
    command.wait()
    with pytest.raises(LaunchError, match=rf"{command.pid} .*which has ended, and by what it started"):
        RunLock(tmp_path, patience=0)  # the child saves
    capsys.readouterr()
    RunLock(tmp_path).close()  # a run that is started again waits until the child has ended
    assert re.search(r"waiting for what an earlier run in .* left behind: process \d+\n", capsys.readouterr().err)


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_run_whose_folder_is_gone_is_stopped_and_makes_it_not_anew(tmp_path: Path, how: str) -> None:
    """It would go on in the folder of a later run, whose lock it does not see."""
    folder = tmp_path / "run"
    lock = RunLock(folder)
    assert lock.lost() == ""
    script = f"""
        import pathlib, shutil, sys, time
        folder = pathlib.Path(sys.argv[1])
        folder.rename(folder.with_name("elsewhere"))
        if {how!r} == "deleted":
            shutil.rmtree(folder.with_name("elsewhere"))
        if {how!r} == "replaced":
            folder.mkdir()
            (folder / "lock").touch()
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    began = time.monotonic()
    outcome = Supervisor(command, folder, tmp_path / "failure.json", os.environ, 2, lock).run()
    assert outcome.code == 2 and "was deleted, moved or replaced while the run wrote to it" in outcome.message
    assert time.monotonic() - began < 40 and folder.exists() == (how == "replaced")
    lock.close()


# Both write to the terminal after it is gone, as a progress bar does.
OF_A_TERMINAL = """
    import os, pathlib, sys
    from launchers.local.supervisor import Supervisor
    folder = pathlib.Path(sys.argv[1])
    outcome = Supervisor([sys.executable, "-c", sys.argv[2], str(folder)], folder, folder / "failure", os.environ, 0).run()
    print("stopped", file=sys.stderr, flush=True)
    (folder / "code").write_text(str(outcome.code))
"""
SAVES = """
    import pathlib, signal, sys, time
    from launchers.local.terminal import outlive_terminal
    outlive_terminal()
    stopping = []
    signal.signal(signal.SIGTERM, lambda *told: stopping.append(told))
    (pathlib.Path(sys.argv[1]) / "ready").touch()
    while not stopping:
        print("step", file=sys.stderr, flush=True)
        time.sleep(0.01)
    time.sleep(0.2)
    (pathlib.Path(sys.argv[1]) / "saved").touch()
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes_asks_to_stop_and_a_checkpoint_is_saved(tmp_path: Path, nohup: bool) -> None:
    """As after a lost ssh connection. The kernel and the shell each send SIGHUP, and the second one must not kill."""

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    master, slave = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(OF_A_TERMINAL), str(tmp_path), textwrap.dedent(SAVES)]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(slave)
    threading.Thread(target=lambda: _drain(master, tmp_path / "ready"), daemon=True).start()
    wait_until((tmp_path / "saved").exists if not nohup else (tmp_path / "lost").exists, 20)
    if nohup:
        time.sleep(0.3)
        assert process.poll() is None and not (tmp_path / "saved").exists()
        process.send_signal(signal.SIGTERM)
    else:
        process.send_signal(signal.SIGHUP)
    process.wait(20)
    assert (tmp_path / "saved").exists() and (tmp_path / "code").read_text() == str(INTERRUPTED)


def _drain(terminal: int, ready: Path) -> None:
    while not ready.exists():
        os.read(terminal, 4096)
    os.close(terminal)
    (ready.parent / "lost").touch()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
