"""Progress bars are seen on every terminal, and logs do not fill with them."""

import ast
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = """
import time
from qwen_moe.progress import bar
for _ in bar(range(4), "working", "item"):
    time.sleep(0.4)
"""


def run(stderr: int) -> None:
    subprocess.run([sys.executable, "-c", SLOW], cwd=ROOT, stderr=stderr, check=True, timeout=60)


@pytest.mark.parametrize("size", [(0, 0), (0, 100), (50, 0), (50, 100)])
def test_a_terminal_shows_them_whatever_its_size(size: tuple[int, int]) -> None:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    run(there)
    os.set_blocking(here, False)
    drawn = os.read(here, 10_000).decode()
    os.close(here)
    os.close(there)
    assert "working:" in drawn and "/4 [" in drawn, drawn


def test_a_log_gets_few_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        run(log.fileno())
    assert (tmp_path / "log").read_text().count("working") <= 2


def test_every_bar_has_this_style() -> None:
    """tqdm's own settings draw nothing on a terminal of 0 rows, and ten lines a second into a log."""
    found = 0
    for path in (ROOT / "qwen_moe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm":
                found += 1
                given = [keyword.value for keyword in node.keywords if keyword.arg is None]
                names = {name.id for value in given for name in ast.walk(value) if isinstance(name, ast.Name)}
                assert names & {"style", "settings"}, f"{path}:{node.lineno}: give **style() of qwen_moe.progress"
    assert found > 10
