"""Seconds from `qwen-moe train` to its first step, by phase, watched from outside: when processes start, when files come.

    python benchmarks/startup.py [recipes/demo.yaml] [section.key=value ...] [--runs 5] [--json]

A run before those prepares data and fills the compile cache, and is not counted. Each run is stopped at its first step.
"""

import argparse
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

LIMIT = 900.0


def _agents(command: psutil.Process) -> list[psutil.Process]:
    """The elastic agent that the command has started, once it is there."""
    return [child for child in command.children() if "qwen_moe.training.elastic" in child.cmdline()]


def phases(process: psutil.Process, run_dir: Path, log: Path) -> dict[str, Callable[[], bool]]:
    """What follows what, and how to see from outside that it has happened."""
    return {
        "command: recipe, data, tokenizer": lambda: bool(_agents(process)),
        "agent: imports": lambda: any(agent.children() for agent in _agents(process)),
        "workers: process group, data, compiler tried": lambda: "elementwise chains" in log.read_text(),
        "workers: model, optimizer, resume": lambda: (run_dir / "attempts.jsonl").exists(),
        "workers: first step": lambda: (
            (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size > 0
        ),
    }


def measure(recipe: str, overrides: list[str], run_dir: Path) -> dict[str, float]:
    """Seconds of every phase of one run, stopped after its first step. Raises RuntimeError where none comes."""
    log = run_dir.with_suffix(".log")
    command = [sys.executable, "-m", "qwen_moe", "train", recipe, *overrides, f"run_dir={run_dir}"]
    start = time.time()
    with log.open("w") as file:
        process = psutil.Popen(command, stdout=file, stderr=file)
    seconds: dict[str, float] = {}
    last = start
    try:
        for phase, over in phases(process, run_dir, log).items():
            while not over():
                if process.poll() is not None or time.time() - start > LIMIT:
                    raise RuntimeError(f"no first step:\n{log.read_text()}")
                time.sleep(0.02)
            now = time.time()
            seconds[phase], last = now - last, now
        return seconds | {"command to first step": last - start}
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qwen-moe-startup-") as folder:
        runs = [measure(args.recipe, args.overrides, Path(folder) / f"run{i}") for i in range(args.runs + 1)]
    if args.json:
        print(
            json.dumps(
                {"machine": platform.processor(), "torch": torch.__version__, "first": runs[0], "runs": runs[1:]}
            )
        )
        return
    for phase in runs[0]:
        print(
            f"{statistics.median(run[phase] for run in runs[1:]):6.2f} s  (first run {runs[0][phase]:6.2f} s)  {phase}"
        )


if __name__ == "__main__":
    main()
