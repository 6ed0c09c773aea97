"""How well do few groups of runs predict the loss of larger models, with and without the prior of the loss law's exponents?

    python benchmarks/few_losses.py SWEEPS [--draws 100] [--json benchmarks/few_losses.json]

SWEEPS is the folder of dense_lr_batch_sweep.csv and chinchilla_runs.csv (not part of this repository). A group is a size
and a duration with its loss. In the dense sweep this is the loss at the group's best learning rate and batch size, on the
surface of the whole sweep. Of Chinchilla's runs, all but the five with the highest losses are taken as they are. Each draw
takes groups at random among the 30, 45 or 60% of least compute, in turns. The law that is fitted to them predicts every
group of 3 times their compute or more.

Then the ladders of `benchmarks/ladder`: their runs predict the larger run that was trained afterwards.

Two of the three published pairs of exponents are Chinchilla's or of its kind: the last figure of a line leaves both out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from launchers.folder.atomic import write_text
from scaling_laws.forms import points, points_of
from scaling_laws.laboratories import LOSS_EXPONENTS, laboratory_prior
from scaling_laws.loss_law import fit_loss
from scaling_laws.runs import read_runs
from scaling_laws.surface_fit import fit_surface
from scaling_laws.validation import compute_of, minima

COUNTS = {"dense": (7, 9, 12), "chinchilla": (8, 15, 30)}
SHARES = (0.3, 0.45, 0.6)
BEYOND = 3.0  # times the compute of the largest group that was drawn
LADDERS = Path(__file__).parent / "ladder"
RUNS = {  # tables of small runs, and of the larger ones
    "first ladder": (("runs.csv",), "held_out_runs.csv"),
    "second ladder": (("second/runs.csv",), "second/held_out_runs.csv"),
    "third ladder": (("third/runs.csv",), "third/held_out_runs.csv"),
    "third ladder, one more round": (("third/runs.csv", "third/next_3.csv"), "third/held_out_runs_2.csv"),
}


def variants() -> dict[str, tuple[float, float] | None]:
    """Exponents that are expected, by name."""
    others = [
        pair for source, pair in LOSS_EXPONENTS.items() if "Hoffmann" not in source and "Muennighoff" not in source
    ]
    return {"without": None, "with": laboratory_prior().loss, "without Chinchilla's": others[0]}


def sweeps(folder: Path) -> dict[str, pd.DataFrame]:
    table = read_runs([folder / "dense_lr_batch_sweep.csv"])
    chinchilla = pd.read_csv(folder / "chinchilla_runs.csv")
    chinchilla = chinchilla.drop(chinchilla.nlargest(5, "loss").index)
    return {
        "dense": minima(fit_surface(table.frame), table.finished),
        "chinchilla": chinchilla.assign(n_active=chinchilla["n_total"]),
    }


def errors(groups: pd.DataFrame, count: int, draws: int) -> list[dict[str, float]]:
    """For each draw the mean relative error of the larger groups' losses, by variant."""
    compute, found = compute_of(groups), []
    for draw in tqdm(range(draws), desc=f"{count} groups", leave=False):
        small = groups[compute <= compute.quantile(SHARES[draw % len(SHARES)])]
        if len(small) < count:
            continue
        drawn = small.sample(count, random_state=draw)
        larger = groups[compute >= BEYOND * compute[drawn.index].max()]
        if min(drawn["n_total"].nunique(), drawn["tokens"].nunique()) < 3 or len(larger) < 2:
            continue
        row = {}
        for name, exponents in variants().items():
            law = fit_loss(points_of(drawn), drawn["loss"].to_numpy(float), exponents=exponents)
            row[name] = float(np.abs(law.at(points_of(larger)) / larger["loss"] - 1).mean())
        found.append(row)
    return found


def ladder(tables: tuple[str, ...], held_out: str) -> dict[str, float]:
    """The relative error of the loss predicted for the recommended point."""
    table = read_runs([LADDERS / name for name in tables])
    best = minima(fit_surface(table.frame), table.finished)
    runs = pd.read_csv(LADDERS / held_out)
    chosen = runs[runs["run"].str.match("recommended")]
    where = points(*(chosen[name].iloc[0] for name in ("n_total", "n_active", "tokens")))
    found = {}
    for name, exponents in variants().items():
        law = fit_loss(points_of(best), best["loss"].to_numpy(float), exponents=exponents)
        found[name] = float(law.at(where)[0] / chosen["loss"].mean() - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"exponents": variants(), "draws": args.draws, "sweeps": {}, "ladders": {}}
    for sweep, groups in sweeps(args.sweeps).items():
        for count in COUNTS[sweep]:
            table = pd.DataFrame(errors(groups, count, args.draws))
            summary = {
                name: {"mean": table[name].mean(), "median": table[name].median(), "90%": table[name].quantile(0.9)}
                for name in table
            }
            found["sweeps"][f"{sweep}, {count} groups"] = {"draws": len(table), **summary}
            text = "   ".join(f"{name} {one['mean']:.2%} (90%: {one['90%']:.2%})" for name, one in summary.items())
            print(f"{sweep}, {count} groups, {len(table)} draws: {text}", flush=True)
    for name, (tables, held_out) in RUNS.items():
        found["ladders"][name] = ladder(tables, held_out)
        print(f"{name}: " + "   ".join(f"{which} {error:+.2%}" for which, error in found["ladders"][name].items()))
    if args.json is not None:
        write_text(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
