"""Kills a pipeline with SIGKILL at random moments of each step, and compares what it leaves with an undisturbed one.

    python benchmarks/pipeline/kills.py SEED qwen-moe pipeline RECIPE.yaml ... --yes
    python benchmarks/pipeline/kills.py compare FOLDER OTHER_FOLDER

The folders are those of the pipelines (``--output``). The command is given again after every kill, and at last to the end.
"""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

# How often each step is killed, and within how many seconds of its start.
KILLS = {
    "prepare": (3, 25.0),
    "ladder": (2, 2.0),
    "run": (5, 60.0),
    "collect": (1, 1.5),
    "fit": (2, 25.0),
    "recommend": (1, 1.5),
    "plan": (2, 4.0),
}
WRITTEN = ("runs.csv", "recommended.yaml", "recipe.yaml", "fit/fit.json")


def kill_once(command: list[str], step: str, seconds: float) -> None:
    """Start the command, and kill it ``seconds`` after it has begun ``step``."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(rf"\[\d/8\] {step}: (?!done before)", line):
            break
    else:
        print(f"{step}: nothing was left to kill", flush=True)
        return
    time.sleep(seconds)
    process.kill()
    process.wait()
    print(f"{step}: killed after {seconds:.1f} s", flush=True)


def losses(run: Path) -> tuple[list[int], dict[int, tuple[float, float]]]:
    """The steps of a run as they were recorded, and the loss and gradient norm of each."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "loss" in record]
    return [r["step"] for r in records], {r["step"]: (r["loss"], r["grad_norm"]) for r in records}


def compare(first: Path, second: Path) -> int:
    """Print what differs. Returns the number of differences."""
    different = [name for name in WRITTEN if (first / name).read_bytes() != (second / name).read_bytes()]
    runs = sorted((first / "ladder" / "runs").iterdir())
    for run in runs:
        steps, mine = losses(run)
        others, theirs = losses(second / "ladder" / "runs" / run.name)
        if mine != theirs or len(set(others)) != len(others) or len(set(steps)) != len(steps):
            different.append(run.name)
    print(f"{len(runs)} runs and {len(WRITTEN)} files; different: {', '.join(different) or 'none'}")
    return len(different)


def main(arguments: list[str]) -> int:
    if arguments[0] == "compare":
        return min(1, compare(Path(arguments[1]), Path(arguments[2])))
    rng, command = random.Random(int(arguments[0])), arguments[1:]
    for step, (times, most) in KILLS.items():
        for _ in range(times):
            kill_once(command, step, rng.uniform(0.1, most))
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
