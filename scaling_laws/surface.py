"""Optimal learning rate and batch size: one response surface for all groups of runs, with Step Law as the baseline.

For runs of a group g (equal N_total, N_active, D), with u = log lr - log lr* and v = log B - log B* (B in tokens),

    log L = level_g + |C (u, v)|^2 + c1 u^3 + c2 u^2 v + c3 u v^2 + c4 v^3
    log lr* = a0 + a1 log N_total + a2 log D + a3 log(N_active / N_total),   log B* likewise

C is lower triangular with a positive diagonal, so the quadratic part is positive definite with its minimum at (lr*, B*).
How it is fitted: `scaling_laws.surface_fit`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

# Logarithms are relative to these, so that intercepts are values at a familiar size.
REFERENCE_N, REFERENCE_D = 1e9, 1e10
# Step Law (arXiv 2503.04715): lr 1.79 N^-0.713 D^0.307, B 0.58 D^0.571 tokens. The
# baseline takes an exponent from here that the table does not determine.
STEP_LAW_LR, STEP_LAW_B = (1.79, -0.713, 0.307), (0.58, 0.0, 0.571)
# DeepSeek LLM (arXiv 2401.02954, equation 1): lr 0.3118 C^-0.1250, B 0.2920 C^0.3271 tokens. Its C counts attention too;
# here it is 6 N D.
DEEPSEEK_LR, DEEPSEEK_B = (0.3118, -0.1250), (0.2920, 0.3271)
ALIKE = 1.1  # models of one intended size or sparsity differ by a few percent (experts, shared experts)
WINDOW = 0.05  # rows within 5% of their group's best: farther out the cubic does not describe the loss
_SHAPE = 7
NOISE = 1.5e-3  # standard deviation of log loss between seeds, where nothing is known of them


def group_excess(frame: pd.DataFrame) -> pd.Series:
    """Each finished run's loss relative to its group's best, minus 1."""
    return frame["loss"] / frame.groupby("group")["loss"].transform("min") - 1


def _features(n_total: Any, n_active: Any, tokens: Any) -> np.ndarray:
    n_total, n_active, tokens = (np.atleast_1d(np.asarray(x, dtype=float)) for x in (n_total, n_active, tokens))
    columns = [
        np.ones_like(n_total),
        np.log(n_total / REFERENCE_N),
        np.log(tokens / REFERENCE_D),
        np.log(n_active / n_total),
    ]
    return np.stack(columns, axis=1)


def _published(law: tuple[float, float, float]) -> np.ndarray:
    scale, by_n, by_d = law
    return np.array([np.log(scale * REFERENCE_N**by_n * REFERENCE_D**by_d), by_n, by_d, 0.0])


def _shape(q: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    first, second = np.exp(q[0]) * u, q[1] * u + np.exp(q[2]) * v
    return first**2 + second**2 + q[3] * u**3 + q[4] * u**2 * v + q[5] * u * v**2 + q[6] * v**3


def shape_root(q: Any) -> np.ndarray:
    """C of the module's formula ``[2, 2]``: near the optimum, the height is |C (u, v)|^2."""
    return np.array([[np.exp(q[0]), 0.0], [q[1], np.exp(q[2])]])


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The laws for log lr* and log B*, as coefficients of (1, log N_total / 1e9, log D / 1e10, log N_active / N_total), and
    the shape. ``held`` names features whose exponents are assumed, because the table does not tell them.
    ``prior_share`` is the prior's share of what is known about each coefficient: 0 where the runs tell it all, 1 where they
    tell nothing. ``noise`` is the standard deviation of log loss near the optimum around the surface."""

    learning_rate: list[float]
    batch: list[float]
    shape: list[float]
    held: list[str]
    prior_share: dict[str, list[float]] = field(default_factory=dict)
    noise: float = NOISE

    def optimum(self, n_total: Any, n_active: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
        """(learning rate, batch size in tokens) that minimise the loss."""
        x = _features(n_total, n_active, tokens)
        return np.exp(x @ np.array(self.learning_rate)), np.exp(x @ np.array(self.batch))

    def excess(self, n_total: Any, n_active: Any, tokens: Any, learning_rate: Any, batch_tokens: Any) -> np.ndarray:
        """Relative loss over the optimum's for a run with other hyperparameters. Beyond `WINDOW` it is not to be trusted."""
        best_rate, best_batch = self.optimum(n_total, n_active, tokens)
        u, v = np.log(np.asarray(learning_rate) / best_rate), np.log(np.asarray(batch_tokens) / best_batch)
        return np.expm1(_shape(np.array(self.shape), u, v))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


FEATURES = ("1", "n_total", "tokens", "sparsity")


def _free(frame: pd.DataFrame) -> np.ndarray:
    """The features whose effects the groups of ``frame`` determine, as a mask."""
    groups = frame.groupby("group").first()
    varied = (groups["n_total"], groups["tokens"], groups["n_active"] / groups["n_total"])
    free = [True, *(bool(values.max() > ALIKE * values.min()) for values in varied)]
    if free[1] and free[2]:
        # If D/N is (nearly) the same everywhere, N and D vary together, and D keeps the published exponent.
        together = np.corrcoef(np.log(groups["n_total"]), np.log(groups["tokens"]))[0, 1]
        free[2] = bool(abs(together) < 0.99)
    return np.array(free)


def fit_step_law(frame: pd.DataFrame) -> Surface:
    """The baseline of arXiv 2503.04715: power laws for the learning rate in N_total and D and for the batch in D alone,
    fitted by least squares in logs to the runs within 0.25% of their group's best. The result has no shape, so its
    `excess` is meaningless."""
    finished = frame[~frame["diverged"]]
    near = finished[group_excess(finished) <= 0.0025]
    told = _free(near) & np.array([True, True, True, False])
    x = _features(near["n_total"], near["n_active"], near["tokens"])
    laws = []
    for column, published in (("learning_rate", STEP_LAW_LR), ("batch_tokens", STEP_LAW_B)):
        free = told & (np.array([True, column == "learning_rate", True, True]))
        law = np.where(free, 0.0, _published(published))
        y = np.log(near[column].to_numpy()) - x @ law
        law[free] = np.linalg.lstsq(x[:, free], y, rcond=None)[0]
        laws.append(law.tolist())
    held = [name for name, free in zip(FEATURES, told, strict=True) if not free]
    return Surface(learning_rate=laws[0], batch=laws[1], shape=[0.0] * _SHAPE, held=held)


def step_law_as_published() -> Surface:
    """Step Law with its published coefficients."""
    return without_shape(_published(STEP_LAW_LR), _published(STEP_LAW_B))


def deepseek_law() -> Surface:
    """DeepSeek LLM's law in compute, with C = 6 N_active D = 6 (N_active / N_total) N_total D."""
    laws = []
    for scale, by_c in (DEEPSEEK_LR, DEEPSEEK_B):
        law = _published((scale * 6**by_c, by_c, by_c))
        law[3] = by_c
        laws.append(law)
    return without_shape(*laws)


def without_shape(rate: np.ndarray, batch: np.ndarray) -> Surface:
    """The surface of two laws, given by their coefficients, whose shape is not known."""
    return Surface(learning_rate=rate.tolist(), batch=batch.tolist(), shape=[0.0] * _SHAPE, held=["published"])


PUBLISHED = {"Step Law, published": step_law_as_published, "DeepSeek LLM": deepseek_law}


def profiled_minima(surface: Surface, frame: pd.DataFrame) -> pd.DataFrame:
    """Each group's loss at its own optimum: the level that the surface gives it, from all runs near its best. One row per
    group with n_total, n_active, tokens and loss, and with granularity and unique_tokens if the table has them."""
    finished = frame[~frame["diverged"]]
    near = finished[group_excess(finished) <= WINDOW]
    height = surface.excess(
        near["n_total"], near["n_active"], near["tokens"], near["learning_rate"], near["batch_tokens"]
    )
    level = (np.log(near["loss"]) - np.log1p(height)).groupby(near["group"]).median()
    kept = [c for c in ("n_total", "n_active", "tokens", "granularity", "unique_tokens") if c in near]
    first = near.groupby("group")[kept].first()
    return first.assign(loss=np.exp(level))


def power_law(surface: Surface, which: str) -> dict[str, float]:
    """{scale, n_total, tokens, sparsity} of the law scale * N_total^n_total * D^tokens * (N_active / N_total)^sparsity."""
    law = surface.learning_rate if which == "learning_rate" else surface.batch
    scale = np.exp(law[0] - law[1] * np.log(REFERENCE_N) - law[2] * np.log(REFERENCE_D))
    return {"scale": float(scale), "n_total": law[1], "tokens": law[2], "sparsity": law[3]}


def nearest_run_excess(surface: Surface, frame: pd.DataFrame) -> dict[int, float]:
    """By group: the excess loss, over the group's best, of the run nearest (in logs) to the recommendation."""
    found = {}
    for group, runs in frame[~frame["diverged"]].groupby("group"):
        first = runs.iloc[0]
        rate, batch = surface.optimum(first["n_total"], first["n_active"], first["tokens"])
        distance = np.log(runs["learning_rate"] / rate[0]) ** 2 + np.log(runs["batch_tokens"] / batch[0]) ** 2
        found[int(group)] = float(runs.loc[distance.idxmin(), "loss"] / runs["loss"].min() - 1)
    return found


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN for no values."""
    found = list(values)
    return float(np.mean(found)) if found else float("nan")
