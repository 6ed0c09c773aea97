"""A curation that is killed, by kill -9, ends with the files of one that was not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.curation.curations import curate, outputs, recipe, write_corpus

pytest.importorskip("datatrove")
pytest.importorskip("pyarrow")

from qwen_moe.curation.dedup import WORK

ROOT = Path(__file__).parents[2]
# What is there when a step is under way: some of its work, and not all.
UNDER_WAY = {
    "read": "1-read/kept/00000.jsonl",
    "filters": "2-filters/kept/00000.jsonl",
    "deduplication": f"5-deduplication/{WORK}/minhash/signatures",
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
    half = (
        run / UNDER_WAY[step].split("/")[0] / "tally/kept/.00000.json.abc_1234"
    )  # of a write in the middle of which it was
    half.parent.mkdir(parents=True, exist_ok=True)
    half.touch()
    assert curate(path) == 0
    assert outputs(run) == outputs(undisturbed / "run")
    assert not list(run.glob(f"*/{WORK}"))


@pytest.mark.slow
def test_ten_kills_in_a_row(undisturbed: Path) -> None:
    """At any time, also in the middle of writes."""
    run = undisturbed / "often"
    path = recipe(undisturbed, run=run.name)
    killed = 0
    for number in range(10):
        process = start(path)
        try:
            process.wait(0.5 + 0.9 * number)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += process.wait(60) == -signal.SIGKILL
    assert killed >= 3
    assert curate(path) == 0
    assert outputs(run) == outputs(undisturbed / "run")


WORKERS = """
import os, sys, time
from pathlib import Path
from qwen_moe.curation.execute import Executor, Stage

folder = sys.argv[1]

def sleep(data, rank, world_size):
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(120)
    yield from ()

if __name__ == "__main__":
    Executor(2).run(Stage("sleep", [sleep], 2, Path(folder)))
"""


def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    """Otherwise they would write to files that the next command writes, too."""
    (tmp_path / "sleep.py").write_text(WORKERS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(tmp_path / "sleep.py"), str(tmp_path)], env=environment)
    try:
        files = [tmp_path / f"pid-{rank}" for rank in range(2)]
        wait(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        assert process.pid not in pids and all(Path(f"/proc/{pid}").exists() for pid in pids)
    finally:
        process.kill()
        process.wait(60)
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)
