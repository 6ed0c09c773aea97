"""Does training in FP8 end where fp32 ends? Trains the demo for 300 steps in fp32, bf16 and every recipe, on the CPU.

    python benchmarks/fp8_loss.py            # trains what is not trained yet, then the table and the picture
    python benchmarks/fp8_loss.py --only mxfp8
    python benchmarks/fp8_loss.py --table

Writes benchmarks/fp8_loss.json and docs/images/fp8_loss.png. One process, one thread, the torch provider; same weights,
same batches in every run. The global batch is a quarter of the demo's (2 sequences of 256 tokens). The second run in bf16
differs from the first by its number of threads, that is, by the order of sums: what lies between the two is noise.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "fp8_loss.json"
PICTURE = ROOT / "docs" / "images" / "fp8_loss.png"
STEPS, BATCH, SEQUENCE, WINDOW = 300, 2, 256, 20
TOKENS = STEPS * BATCH * SEQUENCE
COMMON = {
    "training.train_tokens": TOKENS,
    "training.global_batch_size": BATCH,
    "training.micro_batch_size": BATCH,
    "training.validation_interval": 0,
    "schedule.warmup_tokens": TOKENS // 8,
    "schedule.decay_tokens": TOKENS // 4,
    "checkpoint.interval": 100,
    "checkpoint.keep": 1,
    "checkpoint.export_hf": "false",
    "sample_prompt": "",
    "logging.tensorboard": "false",
    "launch.nproc": 1,
    "launch.threads": 1,
    "precision.kernels": "torch",
}
RUNS = (
    {name: {"precision.compute": name} for name in ("fp32", "bf16")}
    | {"bf16, 2 threads": {"precision.compute": "bf16", "launch.threads": 2}}
    | {
        recipe: {"precision.compute": "fp8", "precision.fp8.recipe": recipe}
        for recipe in ("blockwise", "delayed", "current", "mxfp8")
    }
)


def train(name: str, folder: Path) -> list[dict[str, Any]]:
    """Train run ``name`` (or go on with it, or find it done) and return its records."""
    run_dir = folder / name.replace(", ", "-").replace(" ", "-")
    settings = COMMON | RUNS[name] | {"run_dir": run_dir, "data.prepare.output": folder / "data" / "stdlib"}
    command = [sys.executable, "-m", "qwen_moe", "train", str(ROOT / "recipes" / "demo.yaml")]
    command += [f"{key}={value}" for key, value in settings.items()]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses in nats: every step's, the mean of the last ones, and that on held-out text after the last step."""
    losses = [record["loss"] for record in records if "loss" in record]
    return {
        "losses": [round(loss, 5) for loss in losses],
        "end": statistics.fmean(losses[-WINDOW:]),
        "validation": next(r["validation_loss"] for r in reversed(records) if "validation_loss" in r),
        "step_seconds": statistics.median(r["step_seconds"] for r in records if "step_seconds" in r),
    }


def table(runs: dict[str, Any]) -> str:
    """Markdown: the end of every run and its distance from fp32's."""
    base = runs["fp32"]
    lines = [
        "| | mean of last 20 steps | against fp32 | held out | against fp32 | s per step |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        end, held_out = run["end"], run["validation"]
        lines.append(
            f"| {name} | {end:.4f} | {end / base['end'] - 1:+.2%} | {held_out:.4f} | "
            f"{held_out / base['validation'] - 1:+.2%} | {run['step_seconds']:.2f} |"
        )
    return "\n".join(lines)


def draw(runs: dict[str, Any]) -> None:
    """Left the losses, right their distance from fp32's, both as means over 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def smooth(values: list[float]) -> list[float]:
        return [statistics.fmean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    base = smooth(runs["fp32"]["losses"])
    for name, run in runs.items():
        values = smooth(run["losses"])
        steps = range(1, len(values) + 1)
        left.plot(steps, values, label=name, linewidth=1.2)
        right.plot(steps, [100 * (a / b - 1) for a, b in zip(values, base, strict=True)], label=name, linewidth=1.2)
    left.set_title(f"loss (nats), mean of {WINDOW} steps")
    right.set_title("difference from fp32 in %")
    right.set_ylim(-3, 3)
    for axes in (left, right):
        axes.set_xlabel("step")
    left.legend()
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*RUNS], action="append")
    parser.add_argument("--table", action="store_true", help="table and picture of what is there; trains nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "fp8_loss")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"runs": {}}
    for name in () if args.table else args.only or RUNS:
        known["runs"][name] = summary(train(name, args.folder))
        known |= {"steps": STEPS, "tokens_per_step": BATCH * SEQUENCE, "machine": platform.processor() or "CPU"}
        write_text(RESULTS, json.dumps(known) + "\n")
    runs = {name: known["runs"][name] for name in RUNS if name in known["runs"]}
    if "fp32" in runs:
        print(table(runs))
        draw(runs)


if __name__ == "__main__":
    main()
