"""The supervisor: restarts after crashes while there is progress, reports errors once, stops in order, locks the folder."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
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


def test_an_interrupt_lets_the_worker_save_first(tmp_path: Path) -> None:
    def interrupt_when_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_ready).start()
    assert supervise(tmp_path, WAITING).code == INTERRUPTED
    assert (tmp_path / "saved").exists()


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
