"""How good is a recommendation from few runs? On Step Law's public sweeps (not part of this repository).

    python benchmarks/few_runs.py SWEEPS [--runs 33 12] [--draws 100] [--json benchmarks/few_runs.json]

SWEEPS is the folder of dense_lr_batch_sweep.csv and moe_lr_batch_sweep.csv. Each draw takes runs at random, without
replacement, from the dense models below 2.2e8 parameters. The surface fitted to them recommends a learning rate and a batch
size for each larger group. Its excess loss is measured in two ways:

    nearest   the loss of the group's run nearest to the recommendation (in logs), over the group's best run
    own       the height of the recommended point over the group's own optimum, on the surface of the group's runs

"nearest" is what a user sees, with the noise of the grid (a step changes the learning rate by 1.4 and the batch by up to 2)
and of the seeds (about 0.15%). "own" has neither, but trusts the surface. The prior never contains Step Law. Then each
sparsity is left out, of the MoE sweep alone and of both sweeps.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from launchers.folder.atomic import write_text
from scaling_laws.errors import InputError
from scaling_laws.laboratories import Prior, laboratory_prior
from scaling_laws.runs import read_runs
from scaling_laws.surface import Surface, nearest_run_excess
from scaling_laws.surface_fit import fit_surface
from scaling_laws.validation import own_optima, own_optimum_excess

SMALL = 2.2e8  # parameters; runs are drawn below
MEASURES = ("nearest", "own")
Measure = Callable[[Surface], dict[str, dict[int, float]]]


def larger_groups(large: pd.DataFrame) -> dict[str, list[int]]:
    """Groups to average over, by name."""
    first = large.groupby("group").first()
    compute = first["n_active"] * first["tokens"]
    return {
        "nine of most compute": list(compute.nlargest(9).index),
        "nine with N >= 4e8, D >= 1e10": list(first[(first["n_total"] >= 4e8) & (first["tokens"] >= 1e10)].index),
        "all 24": list(first.index),
    }


def measured(large: pd.DataFrame) -> Measure:
    optima = own_optima(large)

    def measure(surface: Surface) -> dict[str, dict[int, float]]:
        return {"nearest": nearest_run_excess(surface, large), "own": own_optimum_excess(surface, large, optima)}

    return measure


def few_runs(small: pd.DataFrame, large: pd.DataFrame, runs: int, draws: Iterable[int], prior: Prior) -> dict[str, Any]:
    """By groups and measure: mean, median, 90th percentile and worst of the draws' mean excess, in percent."""
    measure, sets = measured(large), larger_groups(large)
    found: dict[str, list[float]] = {}
    refused = 0
    for seed in draws:
        try:
            excess = measure(fit_surface(small.sample(runs, random_state=seed), prior=prior))
        except InputError:
            refused += 1
            continue
        for name, groups in sets.items():
            for how, values in excess.items():
                found.setdefault(f"{name}, {how}", []).append(100 * float(np.mean([values[group] for group in groups])))
    rows = {
        name: {
            "mean": float(np.mean(values)),
            "median": float(np.median(values)),
            "p90": float(np.percentile(values, 90)),
            "worst": float(max(values)),
        }
        for name, values in found.items()
    }
    return {"refused": refused, **rows}


def left_out_sparsities(frame: pd.DataFrame, prior: Prior) -> dict[str, Any]:
    """Each sparsity left out in turn: by measure, the excess of each of its groups in percent, their mean and the worst."""
    sparsity = (frame["n_active"] / frame["n_total"]).round(2)
    rows: dict[str, Any] = {}
    found: dict[str, list[float]] = {how: [] for how in MEASURES}
    for value in sorted(set(sparsity) - {1.0}):
        excess = measured(frame[sparsity == value])(fit_surface(frame[sparsity != value], prior=prior))
        for how, values in excess.items():
            found[how] += [100 * one for one in values.values()]
            rows[f"{value}, {how}"] = [100 * one for one in values.values()]
    return rows | {how: {"mean": float(np.mean(v)), "worst": max(v)} for how, v in found.items()}


def table(found: dict[str, Any]) -> str:
    lines = ["| runs | prior | groups, measure | mean | median | 90% | worst draw |", "|---|---|---|---|---|---|---|"]
    for key, rows in found["few"].items():
        runs, prior = key.split(", ", 1)
        for name, row in rows.items():
            if name != "refused":
                cells = " | ".join(f"{row[column]:.3f}%" for column in ("mean", "median", "p90", "worst"))
                lines.append(f"| {runs} | {prior} | {name} | {cells} |")
    lines += ["", "| sparsity left out of | measure | mean | worst group |", "|---|---|---|---|"]
    for name, rows in found["sparsity"].items():
        lines += [f"| {name} | {how} | {rows[how]['mean']:.3f}% | {rows[how]['worst']:.3f}% |" for how in MEASURES]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path)
    parser.add_argument("--runs", type=int, nargs="+", default=[33, 12])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    dense, moe = (args.sweeps / f"{name}_lr_batch_sweep.csv" for name in ("dense", "moe"))
    frame = read_runs([dense]).frame
    small, large = frame[frame["n_total"] < SMALL], frame[frame["n_total"] >= SMALL]
    priors = {
        "other laboratories": laboratory_prior(["Step Law"]),
        "none": laboratory_prior(["Step Law"], removed=True),
    }
    found: dict[str, Any] = {"draws": args.draws, "few": {}, "sparsity": {}}
    for runs in args.runs:
        for name, prior in priors.items():
            draws = tqdm(range(args.draws), desc=f"{runs} runs, {name}", file=sys.stderr, mininterval=1)
            found["few"][f"{runs}, {name}"] = few_runs(small, large, runs, draws, prior)
    whole = few_runs(small, large, len(small), range(1), priors["other laboratories"])
    found["few"][f"{len(small)} (all), other laboratories"] = whole
    for name, paths in (("MoE sweep", [moe]), ("dense and MoE", [dense, moe])):
        found["sparsity"][name] = left_out_sparsities(read_runs(paths).frame, priors["other laboratories"])
    if args.json is not None:
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
