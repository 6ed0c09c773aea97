"""Public sweeps, where they are at hand, and synthetic runs whose laws are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_laws.runs import RunTable, read_runs

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "scaling"


def public(*names: str) -> RunTable:
    """The named sweeps; skips where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the public sweeps are not at {SHARED}")
    return read_runs([SHARED / f"{name}.csv" for name in names])


# lr* = 2 N^-0.6 D^0.25, B* = 3 D^0.55 tokens, L = 1.7 + 0.4 / (N/1e9)^0.3 + 0.3 / (D/1e10)^0.35.
LAWS: dict[str, Any] = {"rate": (2.0, -0.6, 0.25), "batch": (3.0, 0.0, 0.55), "loss": (1.7, 0.4, 0.3, 0.3, 0.35)}


def optimum(n: float, d: float) -> tuple[float, float]:
    return tuple(scale * n**by_n * d**by_d for scale, by_n, by_d in (LAWS["rate"], LAWS["batch"]))  # type: ignore[return-value]


def best_loss(n: float, d: float) -> float:
    e, big_a, a, big_b, b = LAWS["loss"]
    return e + big_a / (n / 1e9) ** a + big_b / (d / 1e10) ** b


def synthetic(path: Path, noise: float = 5e-4, seed: int = 0, **columns: Any) -> Path:
    """A CSV of a grid of runs around each optimum, with a skewed bowl and noise on log loss."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in (5e7, 1e8, 2e8, 4e8):
        for d in (1e9, 4e9, 1.6e10):
            rate, batch = optimum(n, d)
            offset = rng.normal(0, 0.2, 2)
            for u in np.linspace(-1.2, 1.2, 6) + offset[0]:
                for v in np.linspace(-1.4, 1.4, 6) + offset[1]:
                    height = 0.012 * u**2 + 0.008 * v**2 - 0.006 * u * v + 0.002 * u**3
                    loss = best_loss(n, d) * np.exp(height + rng.normal(0, noise))
                    rows.append(
                        {
                            "n_total": n,
                            "tokens": d,
                            "seq_len": 1024,
                            "learning_rate": rate * np.exp(u),
                            "batch_size": batch * np.exp(v) / 1024,
                            "loss": loss,
                        }
                        | columns
                    )
    pd.DataFrame(rows).to_csv(path, index=False)
    return path
