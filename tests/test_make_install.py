"""`make install` with a stand-in for Python and pip: one line for each phase, and what failed is shown and ends make."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHASES = "making .venv ...\ninstalling torch (some minutes) ...\ninstalling the other packages (some minutes) ...\n"
# `python3 -m venv DIR` makes a DIR/bin/python, which is this again; `-m pip` prints what real ones print.
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi
echo "$*" >> calls
echo "WARNING: Location 'x' is ignored" >&2
case "$*" in *"$FAILS"*) echo "ERROR: no matching distribution" >&2; exit ${STATUS:-3};; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def install(folder: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        if not (folder / name).exists():  # a newer copy would install again
            shutil.copy(ROOT / name, folder)
    (folder / "python3").write_text(PYTHON)
    (folder / "python3").chmod(0o755)
    command = ["make", "install", "PYTHON=./python3", "VENV=.venv"]
    environ = {"PATH": "/usr/bin:/bin", "FAILS": "nothing"} | environ
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


def test_it_is_quiet(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, PHASES, "")
    assert "Location" in (tmp_path / ".venv/install.log").read_text()
    torch = next(x for x in (ROOT / "constraints.txt").read_text().splitlines() if x.startswith("torch=="))
    upgrade, first, rest = (tmp_path / "calls").read_text().splitlines()
    assert first == f"-m pip install --quiet {torch}" and upgrade.endswith("--upgrade pip")
    assert rest == "-m pip install --quiet --constraint constraints.txt --editable .[test]"
    assert "Nothing to be done" in install(tmp_path).stdout


@pytest.mark.parametrize("where", ["--upgrade pip", "torch==", "--editable"])
def test_a_failure_is_shown_and_ends_it(where: str, tmp_path: Path) -> None:
    done = install(tmp_path, FAILS=where)
    assert done.returncode == 2 and not (tmp_path / ".venv/.installed").exists()
    assert "ERROR: no matching distribution" in done.stderr and "failed with status 3" in done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[-1].count(where) == 1  # nothing after it
    assert install(tmp_path).returncode == 0


def test_an_error_of_pip_without_a_status_is_shown(tmp_path: Path) -> None:
    done = install(tmp_path, FAILS="--editable", STATUS="0")
    assert (done.returncode, done.stdout) == (0, PHASES) and done.stderr == "ERROR: no matching distribution\n"
