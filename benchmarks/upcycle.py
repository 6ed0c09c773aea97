"""Does a mixture of experts learn faster from a dense model than from scratch? On recipes/upcycle_demo.yaml.

    python benchmarks/upcycle.py --image curve.png          # trains what is not trained yet, then the table and the picture
    python benchmarks/upcycle.py --image curve.png --figures  # only reads benchmarks/upcycle.json

The dense model reads the recipe's tokens. Then each of these reads as many other ones, the same for all: the dense model
itself, the same MoE model from scratch, and the MoE model upcycled in several ways. One more MoE model from scratch reads as
many tokens as the dense model and its successors together.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launchers.folder.atomic import replaced, write_text

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "upcycle_demo.yaml"
RESULTS = ROOT / "benchmarks" / "upcycle.json"
TOKENS, PER_STEP = 307_200, 1024  # of the recipe
EARLY = 60  # a step whose loss is shown
OTHERS = "seed=4321"  # the batches of every run but the dense model's
SHAPE = ("--experts", "12", "--top-k", "3", "--expert-size", "128", "--shared-expert", "128")
WAYS = {
    "fine_grained, half re-initialized": (),
    "fine_grained, nothing re-initialized": ("--reinitialize", "0"),
    "same_function": ("--method", "same_function"),
}


def run(*command: str) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "qwen_moe", *command], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def train(folder: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Train the recipe (or go on with it, or find it done) with ``overrides``. Returns the records of its steps."""
    settings = [f"run_dir={folder / name}", f"data.prepare.output={folder / 'data' / 'stdlib'}", "launch.nproc=1"]
    run("train", str(RECIPE), *settings, *overrides)
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def curve(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The loss of the first batch, before any update; then validation losses as (step, loss)."""
    first = next(record["loss"] for record in records if record["step"] == 1 and "loss" in record)
    points = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
    return {"first": first, "validation": points}


def measure(folder: Path) -> dict[str, Any]:
    train(folder, "dense")
    dense = str(folder / "dense")
    found = {"dense, continued": curve(train(folder, "dense-continued", OTHERS, f"checkpoint.load_from={dense}"))}
    model = ""
    for number, (name, options) in enumerate(WAYS.items()):
        target = folder / f"upcycled-{number}"
        if not target.exists():
            run("convert", "upcycle", dense, str(target), *SHAPE, *options)
        model = f"model={(target / 'model_config.json').read_text(encoding='utf-8')}"
        start = f"checkpoint.load_from={target}"
        found[f"upcycled: {name}"] = curve(train(folder, f"from-upcycled-{number}", OTHERS, model, start))
    found["from scratch"] = curve(train(folder, "scratch", OTHERS, model))
    twice = (OTHERS, model, f"training.train_tokens={2 * TOKENS}")
    found["from scratch, twice the tokens"] = curve(train(folder, "scratch-twice", *twice))
    return found


def draw(found: dict[str, Any], image: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, one in found.items():
        steps, losses = zip(*one["validation"], strict=True)
        style = "--" if "scratch" in name else "-"
        tokens = [step * PER_STEP / 1e6 for step in steps]
        axes.plot(tokens, losses, style, marker="o", markersize=3, label=f"{name} ({losses[-1]:.3f})")
    axes.set_xlabel("tokens since the start of each run (millions)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replaced(image) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "upcycle_benchmark")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    if not args.figures:
        write_text(RESULTS, json.dumps(measure(args.folder), indent=1) + "\n")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(found, args.image)
    print(f"| model | loss of the first batch | after {EARLY * PER_STEP:,} tokens | at the end |\n|---|---|---|---|")
    for name, one in found.items():
        losses = dict(one["validation"])
        print(f"| {name} | {one['first']:.3f} | {losses[EARLY]:.3f} | {one['validation'][-1][1]:.3f} |")


if __name__ == "__main__":
    main()
