"""What came of it, as text for README.md and a picture, from the fit, the prediction and the held-out runs:

python benchmarks/ladder/outcome.py FIT_DIR HELD_OUT_DIR [--pictures DIR]
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from launchers.folder.run_folder import read_json
from scaling_laws.fitting import load_fit


def held_out_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> learning rate, batch, loss (nats per token; validation) of the runs that have ended."""
    from qwen_moe.scaling.collect import collect

    found = collect([folder], "validation")
    for name, state, why in found.left_out:
        print(f"{name}: {state}: {why}", file=sys.stderr)
    return {row["run"]: row for row in found.rows}


def text(prediction: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| run | learning rate | sequences | loss | against the recommended |", "|---|---|---|---|---|"]
    measured = rows["recommended"]["loss"]
    for name, row in rows.items():
        lines.append(
            f"| {name.replace('_', ' ')} | {row['learning_rate']:.3g} | {row['batch_size']} | {row['loss']:.4f} | "
            f"{row['loss'] / measured - 1:+.2%} |"
        )
    predicted = prediction["predicted_loss"]
    best = min(rows, key=lambda name: rows[name]["loss"])
    lines += [
        "",
        f"Predicted {predicted:.4f}, measured {measured:.4f}: {predicted / measured - 1:+.2%}. The best of these is the "
        f"{best.replace('_', ' ')} run.",
    ]
    return "\n".join(lines)


def draw(fit_dir: Path, prediction: dict[str, Any], rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Measured loss of every small run and of the held-out ones over compute, with the law's line for each group's best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with (fit_dir / "runs.csv").open(encoding="utf-8") as file:
        small = [row for row in csv.DictReader(file) if row["loss"]]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for experts in sorted({float(row["num_experts"]) for row in small}):
        mine = [row for row in small if float(row["num_experts"]) == experts]
        compute = [6 * float(row["n_active"]) * float(row["tokens"]) for row in mine]
        axes.plot(compute, [float(r["loss"]) for r in mine], ".", label=f"ladder, {experts:g} experts")
    for name, row in rows.items():
        middle = name == "recommended"
        compute_here = 6 * row["n_active"] * row["tokens"]
        style = {"marker": "o" if middle else "x", "color": "tab:red"}
        axes.plot(compute_here, row["loss"], linestyle="", label=name.replace("_", " ") if middle else None, **style)
    axes.plot(prediction["flops"], prediction["predicted_loss"], "k_", markersize=16, label="predicted")
    axes.set(xscale="log", xlabel="FLOPs (6 N_active D)", ylabel="validation loss (nats per token)")
    law = load_fit(fit_dir).loss_law
    axes.set_title("" if law is None else law.text, fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fit", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    prediction, rows = read_json(args.held_out / "prediction.json"), held_out_rows(args.held_out)
    print(text(prediction, rows))
    if args.pictures is not None:
        draw(args.fit, prediction, rows, args.pictures / "held_out_run.png")


if __name__ == "__main__":
    main()
