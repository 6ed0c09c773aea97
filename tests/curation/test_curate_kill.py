"""A curation that is killed, by kill -9, ends with the files of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.curation.curations import curate, outputs, recipe, write_corpus

pytest.importorskip("datatrove")
pytest.importorskip("pyarrow")

ROOT = Path(__file__).parents[2]
# What is there when a step is under way: some of its work, and not all.
UNDER_WAY = {
    "read": "1-read/kept/00000.jsonl",
    "filters": "2-filters/kept/00000.jsonl",
    "deduplication": "5-deduplication/work/minhash/signatures",
    "weights": "7-weights/tokenizer",
    "prepare": "8-prepare/notes.bin",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_corpus(folder / "corpus")
    assert curate(recipe(folder)) == 0
    return folder


def start(path: Path) -> "subprocess.Popen[bytes]":
    """The command in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qwen_moe", "data", "curate", str(path), "workers=2"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def kill_at(path: Path, sign: Path) -> bool:
    """Kill the command alone, not its workers, as soon as ``sign`` is there. Whether it was killed before its end."""
    process = start(path)
    try:
        while not sign.exists() and process.poll() is None:
            time.sleep(0.005)
    finally:
        process.kill()
        code = process.wait(60)
    return code == -signal.SIGKILL


@pytest.mark.parametrize(
    "step",
    ["deduplication", *(pytest.param(step, marks=pytest.mark.slow) for step in UNDER_WAY if step != "deduplication")],
)
def test_a_killed_curation_ends_with_the_same_files(step: str, undisturbed: Path) -> None:
    run = undisturbed / f"killed-{step}"
    path = recipe(undisturbed, run=run.name)
    assert kill_at(path, run / UNDER_WAY[step])
    assert not (run / "curate.md").exists() or step != "read"
    assert curate(path) == 0
    assert outputs(run) == outputs(undisturbed / "run")
    assert not list(run.glob("*/work"))


@pytest.mark.slow
def test_ten_kills_in_a_row(undisturbed: Path) -> None:
    """At any time, also in the middle of writes."""
    run = undisturbed / "often"
    path = recipe(undisturbed, run=run.name)
    killed = 0
    for number in range(10):
        process = start(path)
        try:
            process.wait(2 + 0.7 * number)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += process.wait(60) == -signal.SIGKILL
    assert killed >= 3
    assert curate(path) == 0
    assert outputs(run) == outputs(undisturbed / "run")


def test_workers_end_with_a_killed_command(undisturbed: Path) -> None:
    """Otherwise they would write to files that the next command writes, too."""
    run = undisturbed / "orphans"
    path = recipe(undisturbed, run=run.name)
    assert kill_at(path, run / "1-read/kept/00000.jsonl")
    end = time.monotonic() + 20
    while (left := commands_with(str(path))) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def commands_with(text: str) -> list[str]:
    """Processes whose command line or current work names ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue
        if text in line and int(entry.name) != os.getpid():
            found.append(line)
    return found
