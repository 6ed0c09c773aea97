"""Runs chosen by what they teach, against runs drawn at random. On Step Law's public sweep (not part of this repository).

    python -m benchmarks.next_runs SWEEPS [--draws 100] [--json benchmarks/next_runs.json]

As in few_runs.py, runs are of the dense models below 2.2e8 parameters, and what is measured is the excess loss of the
recommendations for the nine groups of most compute. Here some runs are drawn at random, and then one run after the other
is chosen from the rest of the sweep, after a new fit each time: the one that lowers the expected excess at the middle of the
nine groups most, or most per FLOP.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.few_runs import SMALL, Measure, larger_groups, measured
from launchers.folder.atomic import write_text
from scaling_laws.laboratories import Prior, laboratory_prior
from scaling_laws.ladder import Run
from scaling_laws.next_runs import excess_after
from scaling_laws.runs import read_runs
from scaling_laws.surface_fit import fit_surface, posterior

Way = Literal["most", "most per FLOP", "random"]
PLANS = ((8, 12), (12, 20), (12, 33))  # runs that are drawn, and runs in the end


def as_runs(frame: pd.DataFrame) -> list[Run]:
    columns = ["n_total", "n_active", "tokens", "learning_rate", "batch_tokens"]
    return [
        Run(group=0, trunk=None, flops=6 * row["n_active"] * row["tokens"], **row)
        for row in frame[columns].to_dict("records")
    ]


def chosen(
    pool: pd.DataFrame, drawn: int, total: int, way: Way, target: tuple[float, float, float], seed: int, prior: Prior
) -> pd.DataFrame:
    """``total`` runs of ``pool``, of which ``drawn`` are drawn at random and the others chosen one by one."""
    have = pool.sample(total if way == "random" else drawn, random_state=seed)
    while len(have) < total:
        rest = pool.drop(have.index)
        runs = as_runs(rest)
        excess = np.array(excess_after(posterior(have, prior), target, runs))
        cost = np.array([run.flops for run in runs]) if way == "most per FLOP" else 1.0
        gain = (excess.max() - excess) / cost
        have = pd.concat([have, rest.iloc[[int(gain.argmax())]]])
    return have


def rows_of(
    pool: pd.DataFrame,
    measure: Measure,
    groups: list[int],
    target: tuple[float, float, float],
    draws: int,
    prior: Prior,
) -> list[dict[str, Any]]:
    rows = []
    for drawn, total in PLANS:
        for way in ("random", "most", "most per FLOP"):
            found: dict[str, list[float]] = {"nearest": [], "own": []}
            flops = []
            for seed in tqdm(range(draws), desc=f"{total} runs, {way}", file=sys.stderr, mininterval=1):
                runs = chosen(pool, drawn, total, way, target, seed, prior)
                flops.append(float((6 * runs["n_active"] * runs["tokens"]).sum()))
                for how, excess in measure(fit_surface(runs, prior=prior)).items():
                    found[how].append(100 * float(np.mean([excess[group] for group in groups])))
            row: dict[str, Any] = {
                "drawn": total if way == "random" else drawn,
                "runs": total,
                "way": way,
                "flops": float(np.mean(flops)),
            }
            rows.append(row | {how: {"mean": float(np.mean(v)), "worst": max(v)} for how, v in found.items()})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| runs | of them drawn | the others | FLOPs | nearest run: mean, worst draw | own optimum: mean, worst draw |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[how]['mean']:.3f}, {row[how]['worst']:.3f}" for how in ("nearest", "own")]
        lines.append(f"| {row['runs']} | {row['drawn']} | {row['way']} | {row['flops']:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    frame = read_runs([args.sweeps / "dense_lr_batch_sweep.csv"]).frame
    small, large = frame[frame["n_total"] < SMALL], frame[frame["n_total"] >= SMALL]
    groups = larger_groups(large)["nine of most compute"]
    middle = np.exp(np.log(large.groupby("group").first().loc[groups, ["n_total", "n_active", "tokens"]]).mean())
    target = (float(middle["n_total"]), float(middle["n_active"]), float(middle["tokens"]))
    rows = rows_of(small, measured(large), groups, target, args.draws, laboratory_prior(["Step Law"]))
    if args.json is not None:
        write_text(args.json, json.dumps({"draws": args.draws, "target": target, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
