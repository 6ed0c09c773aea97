"""Commands in processes of their own: what they print, how they end, and how they are stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers.local.lock import RunLock
from qwen_moe.posttraining import process
from qwen_moe.posttraining.process import run_command
from qwen_moe.workflow.state import Stopped


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are Python scripts."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c"))


def stopped(script: str) -> int:
    with pytest.raises(Stopped) as error:
        run_command([script], {})
    return int(error.value.args[0])


@pytest.mark.usefixtures("python")
def test_output_variables_and_exit_codes() -> None:
    script = "import os, sys; print('told', file=sys.stderr); print('found', os.environ['ASKED'])"
    assert run_command([script], {"ASKED": "7"}) == "found 7\n"
    assert stopped("raise SystemExit(2)") == 2
    assert stopped("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 128 + signal.SIGKILL


@pytest.mark.usefixtures("python")
def test_a_command_holds_the_lock_until_it_has_ended(tmp_path: Path) -> None:
    """What a killed walk left behind is waited for: a training run may still be saving a checkpoint."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    command = f"from pathlib import Path; import time; Path({str(started)!r}).touch(); time.sleep(1.5); "
    command += f"Path({str(ended)!r}).touch()"
    script = (
        "import sys; from pathlib import Path\n"
        "from launchers.local.lock import RunLock\n"
        "from qwen_moe.posttraining import process\n"
        "process.COMMAND = (sys.executable, '-c')\n"
        "process.before_exec = lambda: None\n"  # it takes its time to end
        f"lock = RunLock(Path({str(tmp_path)!r}))\n"
        f"process.run_command([{command!r}], {{}}, lock.pass_fds)\n"
    )
    walk = subprocess.Popen([sys.executable, "-c", script])
    while not started.exists():
        assert walk.poll() is None
        time.sleep(0.01)
    walk.kill()
    walk.wait()
    lock = RunLock(tmp_path, patience=60)
    assert ended.exists()
    lock.close()


@pytest.mark.usefixtures("python")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_command_end_by_itself(tmp_path: Path, number: int) -> None:
    saved = tmp_path / "saved"
    script = (
        "import pathlib, sys, time\n"
        f"ready, saved = pathlib.Path({str(tmp_path / 'ready')!r}), pathlib.Path({str(saved)!r})\n"
        "try:\n    ready.touch()\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    saved.touch()\n    sys.exit(130)\n"
    )

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert stopped(script) == 130
    assert saved.exists()


def test_what_failed_is_not_said_to_have_been_stopped() -> None:
    for code in (0, 130):
        assert Stopped(code).text("dpo") == "stopped in step dpo (the same command continues with it)"
    assert Stopped(2).text("dpo").startswith("step dpo failed (exit code 2; the reason is above). Once that is mended")
