"""Does the second stage of recipes/long_context_demo.yaml read 2,048 tokens better than the first stage's model?

    python benchmarks/long_context_demo.py            # trains what is not trained yet, then the figures and the pictures
    python benchmarks/long_context_demo.py --figures  # only reads benchmarks/long_context_demo.json

Compares, by position, the loss on windows of 2,048 tokens of validation files of three models: after the first stage, after
the second, and after a run of the same length that has read sequences of 256 tokens only. Writes
benchmarks/long_context_demo.json and two pictures in docs/images.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from launchers.folder.atomic import replaced, write_text

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "long_context_demo.yaml"
RESULTS = ROOT / "benchmarks" / "long_context_demo.json"
IMAGES = ROOT / "docs" / "images"
WINDOW, BIN = 2048, 128  # tokens; positions drawn as one point
MOST, EVERY = 3, 4  # windows of one file; of all these, every fourth
ONLY_SHORT = ("stages=[]", "training.train_tokens=1720320")


def train(folder: Path, name: str, *overrides: str) -> Path:
    """Train the recipe (or go on with it, or find it done). Returns the run folder."""
    settings = [f"run_dir={folder / name}", f"data.prepare.output={folder / 'data' / 'stdlib'}"]
    command = [sys.executable, "-m", "qwen_moe", "train", str(RECIPE), *settings, *overrides]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    return folder / name


def windows(run: Path) -> Any:
    """``[n, WINDOW + 1]``: windows of validation files that are long enough, none of which overlap."""
    import torch

    from qwen_moe.config import load_config
    from qwen_moe.data.content import document_lengths
    from qwen_moe.data.inputs import train_datasets
    from qwen_moe.data.lengths import training_lengths
    from qwen_moe.data.manifest import bin_path

    config = load_config(run / "config.yaml")
    (dataset,) = train_datasets(config)
    import numpy as np

    lengths = document_lengths(dataset.prefix)
    tokens = np.memmap(bin_path(dataset.prefix), mode="r", dtype=np.uint16)
    ends = lengths.astype(np.int64).cumsum()
    first = len(training_lengths(config.data, [dataset])[0])  # validation files follow those for training
    found = []
    for end, length in zip(ends[first:].tolist(), lengths[first:].tolist(), strict=True):
        for start in range(end - length, end - WINDOW, WINDOW)[:MOST]:
            found.append(torch.from_numpy(tokens[start : start + WINDOW + 1].astype(np.int64)))
    return torch.stack(found[::EVERY])


def loss_by_position(checkpoint: Path, rows: Any) -> list[float]:
    """Mean loss in nats in each bin of BIN positions."""
    import torch
    import torch.nn.functional as F

    import qwen_moe

    model = qwen_moe.from_pretrained(checkpoint, dtype=torch.float32).eval()
    total = torch.zeros(WINDOW, dtype=torch.float64)
    with torch.no_grad():
        for row in rows:
            logits = model(row[None, :-1])
            total += F.cross_entropy(logits[0].float(), row[1:], reduction="none").double()
    return (total / len(rows)).view(-1, BIN).mean(1).tolist()


def measure(folder: Path) -> dict[str, Any]:
    staged, short = train(folder, "stages"), train(folder, "short", *ONLY_SHORT)
    rows = windows(staged)
    shutil.copyfile(staged / "loss.png", IMAGES / "long_context_loss.png")
    return {
        "windows": len(rows),
        "losses": {
            "after the first stage": loss_by_position(staged / "checkpoints" / "step_00000600", rows),
            "256 tokens throughout": loss_by_position(short / "checkpoints" / "step_00000840", rows),
            "after the second stage": loss_by_position(staged / "checkpoints" / "step_00000720", rows),
        },
    }


def draw(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    positions = [BIN * (k + 0.5) for k in range(WINDOW // BIN)]
    for (name, losses), color in zip(found["losses"].items(), ("tab:blue", "tab:gray", "tab:orange"), strict=True):
        axes.plot(positions, losses, "o-", color=color, markersize=4, label=f"{name} (mean {mean(losses):.3f})")
    axes.axvline(256, color="gray", linestyle="--", linewidth=1)
    axes.annotate("256, the first stage's length", (256, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                  textcoords="offset points", fontsize=8, color="dimgray")  # fmt: skip
    axes.set_xlabel("position in the sequence")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced(IMAGES / "long_context_positions.png") as file:
        figure.savefig(file, format="png", dpi=120)


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "long_context_demo_benchmark")
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    if not args.figures:
        write_text(RESULTS, json.dumps(measure(args.folder), indent=1) + "\n")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(found)
    print("| position | " + " | ".join(found["losses"]) + " |")
    print("|---" * (1 + len(found["losses"])) + "|")
    for first in range(0, WINDOW, 4 * BIN):
        cells = [f"{mean(losses[first // BIN : first // BIN + 4]):.3f}" for losses in found["losses"].values()]
        print(f"| {first:,} to {first + 4 * BIN - 1:,} | " + " | ".join(cells) + " |")
    print(f"{found['windows']} windows of validation files")


if __name__ == "__main__":
    main()
