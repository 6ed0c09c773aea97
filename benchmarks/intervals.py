"""Counts how often the intervals of `qwen-moe scaling` hold the truth, for runs of planted laws.

    python benchmarks/intervals.py [--tables 12] [--json FILE]

Each table is a small ladder whose laws are drawn: those of learning rate and batch from the prior (so the optimum is often
at the edge of the runs), the loss law around Chinchilla's. The bowl is 20% steeper towards high learning rates than to low
ones, which no cubic describes exactly. Targets have 4, 30 and 1,000 times the compute of the largest run. For each way to
make intervals, a row has the share of tables whose 95% intervals hold the best learning rate and batch, and the loss of the
run that was recommended.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd

from scaling_laws import fitting, recommend
from scaling_laws.laboratories import laboratories_law, laboratory_prior
from scaling_laws.runs import RunTable
from scaling_laws.surface import _features

STEP, TIMES, SAMPLES = 0.8, (4, 30, 1000), 40
CROSS = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
GRID = [(u, v) for u in (-1, 0, 1) for v in (-1, 0, 1)]
SIZES = (1.2e7, 3e7, 7e7)
Row = tuple[float, float, float, float, float]  # n_total, activated share, tokens per activated parameter, u, v


def designs(rng: np.random.Generator) -> dict[str, list[Row]]:
    """Ladders by name."""
    return {
        "6 groups of 9": [(n, 1.0, r, u, v) for n in SIZES for r in (20, 80) for u, v in GRID],
        "6 groups of 5": [(n, 1.0, r, u, v) for n in SIZES for r in (20, 80) for u, v in CROSS],
        "12 groups of 5, MoE": [
            (n, share, r, u, v)
            for n in (3e7, 7e7, 1.6e8, 4e8)
            for share, r in ((1.0, 20), (0.25, 20), (0.1, 80))
            for u, v in CROSS
        ],
        "40 scattered": [
            (rng.choice([5e6, *SIZES, 1.6e8]), 1.0, rng.choice([10, 20, 40, 80]), *rng.uniform(-1.9, 1.9, 2))
            for _ in range(40)
        ],
    }


class Truth:
    """Planted laws."""

    def __init__(self, rng: np.random.Generator) -> None:
        prior = laboratory_prior()
        self.rate, self.batch = (rng.multivariate_normal(*law) for law in (prior.learning_rate, prior.batch))
        self.root = np.array([np.log(0.1), 0.0, np.log(0.09)]) + rng.normal(0, (0.25, 0.04, 0.25))
        self.loss = np.array([1.8, 0.36, 0.45]) * np.exp(rng.normal(0, (0.1, 0.2, 0.2)))
        self.powers = 0.34 + rng.normal(0, 0.03, 2)

    def optimum(self, n: Any, active: Any, d: Any) -> tuple[np.ndarray, np.ndarray]:
        x = _features(n, active, d)
        return np.exp(x @ self.rate), np.exp(x @ self.batch)

    def at(self, n: Any, active: Any, d: Any, rate: Any, batch: Any) -> np.ndarray:
        """Loss of runs."""
        best = self.optimum(n, active, d)
        u, v = np.log(rate / best[0]), np.log(batch / best[1])
        height = (np.exp(self.root[0]) * u) ** 2 + (self.root[1] * u + np.exp(self.root[2]) * v) ** 2
        size = np.asarray(active) ** 0.7 * np.asarray(n) ** 0.3
        level = self.loss @ np.stack(
            [np.ones_like(size), (size / 1e9) ** -self.powers[0], (d / 1e10) ** -self.powers[1]]
        )
        return np.asarray(level * np.exp(height * (1 + 0.1 * np.tanh(u))))


def table(rows: list[Row], truth: Truth, noise: float, rng: np.random.Generator) -> RunTable:
    n, share, ratio, u, v = np.array(rows).T
    active, d = n * share, n * share * ratio
    rate, batch = laboratories_law().optimum(n, active, d)
    rate, batch = rate * np.exp(STEP * u), batch * np.exp(STEP * v)
    loss = truth.at(n, active, d, rate, batch) * np.exp(rng.normal(0, noise, len(n)))
    values = {"n_total": n, "n_active": active, "tokens": d, "learning_rate": rate, "batch_tokens": batch, "loss": loss}
    frame = pd.DataFrame(values | {"diverged": False})
    frame["group"] = frame.groupby(["n_total", "n_active", "tokens"]).ngroup()
    return RunTable(frame=frame, convention="non_vocabulary")


def held(found: fitting.Fit, truth: Truth, share: float, most: float) -> dict[str, bool]:
    """Whether each interval holds the truth, by quantity and times of compute. No interval holds nothing."""
    inside = {}
    for times in TIMES:
        active = (most * times / 120) ** 0.5
        n, d = active / share, 20 * active
        request = recommend.Request(n_total=n, n_active=active, tokens=d, seq_len=1, accept_extrapolation=True)
        told = recommend.recommend(found, request)
        rate, batch = (float(value[0]) for value in truth.optimum(n, active, d))
        loss = float(truth.at(n, active, d, told["learning_rate"], told["batch_size_tokens"])[0])
        for key, true in (("learning_rate", rate), ("batch_size_tokens", batch), ("predicted_loss", loss)):
            low, high = told["intervals"][key] or (np.nan, np.nan)
            inside[f"{key} {times}x"] = bool(low <= true <= high)
    return inside


def nothing(*_: Any) -> list[Any]:
    """In place of held-out errors, which are not needed."""
    return []


def counted(name: str, noise: float, few: int, tables: int) -> dict[str, float]:
    """The share of tables whose interval holds the truth, by quantity. Tables of fewer groups than ``few`` have draws."""
    found: list[dict[str, bool]] = []
    for seed in range(tables):
        rng = np.random.default_rng([seed, 1])
        truth, rows = Truth(rng), designs(rng)[name]
        runs = table(rows, truth, noise, rng)
        most = float((6 * runs.frame["n_active"] * runs.frame["tokens"]).max())
        with (
            patch.object(fitting, "FEW_GROUPS", few),
            patch.object(fitting, "hold_outs", nothing),
            patch.object(fitting, "over_extrapolation", nothing),
            patch.object(recommend, "LEAST_SAMPLES", 5),  # fewer refits than usual, and few give a loss law
        ):
            fit = fitting.fit_table(runs, samples=SAMPLES, seed=seed, progress=lambda steps: steps)
            found.append(held(fit, truth, 0.25 if "MoE" in name else 1.0, most))
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=int, default=12)
    parser.add_argument("--noise", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--runs", nargs="+", choices=list(designs(np.random.default_rng(0))), help="default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    names = args.runs or list(designs(np.random.default_rng(0)))
    for name, noise, (way, few) in itertools.product(names, args.noise, (("draws", 10**6), ("refits", 0))):
        shares = counted(name, noise, few, args.tables)
        results.append({"runs": name, "noise": noise, "intervals": way, "tables": args.tables} | shares)
        print(
            name, f"{noise:.1%}", way, *(f"{key}: {share:.0%}" for key, share in shares.items()), sep="  ", flush=True
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
