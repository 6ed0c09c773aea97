"""Learning rate, batch size and predicted loss of a run that is about to be launched, and how far to trust them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_laws.errors import InputError
from scaling_laws.fitting import Fit
from scaling_laws.forms import points
from scaling_laws.loss_law import compute_optimal
from scaling_laws.surface import PUBLISHED, WINDOW, Surface

WIDE = 1e-3  # excess loss that a wide batch may cost
LEAST_GROUPS = 5  # groups below which resamples are too much alike to tell anything
MOST_COMPUTE, MOST_OTHER = 1000.0, 30.0  # how far outside the runs a request may lie without being asked twice
LEAST_STEPS = 50  # of a run: with fewer no batch size is a recommendation


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be launched. ``flops`` = 6 N_active D instead of sizes; ``ratio`` is then N_active / N_total, by default
    the best that the runs cover."""

    n_total: float | None = None
    n_active: float | None = None
    tokens: float | None = None
    flops: float | None = None
    ratio: float | None = None
    granularity: float | None = None
    unique_tokens: float | None = None
    seq_len: int
    data_parallel: int = 1
    micro_batch: int = 1
    accept_extrapolation: bool = False


def _interval(values: list[float]) -> list[float] | None:
    return [float(x) for x in np.percentile(values, [2.5, 97.5])] if len(values) >= 20 else None


def _beyond(fit: Fit, values: dict[str, float]) -> dict[str, float]:
    """By quantity: how many times beyond the covered range, 1 inside it."""
    found = {}
    for name, value in values.items():
        low, high = fit.ranges[name]
        found[name] = max(1.0, value / high, low / value)
    return found


def _refuse(fit: Fit, beyond: dict[str, float], accepted: bool) -> list[str]:
    """Warnings of an extrapolation that was accepted; InputError for one that was not."""
    reasons = []
    if fit.sizes < 3:
        reasons.append(f"the runs have {fit.sizes} sizes, fewer than 3")
    if fit.durations < 2:
        reasons.append("all runs have the same tokens per parameter")
    for name, ratio in beyond.items():
        limit = MOST_COMPUTE if name == "compute" else MOST_OTHER
        if ratio > limit:
            reasons.append(f"{name} is {ratio:,.0f} times outside the runs (limit {limit:,.0f})")
    if reasons and not accepted:
        raise InputError(
            f"not recommended: {'; '.join(reasons)}. Add runs closer to the request (several sizes and durations), or give "
            "--accept-extrapolation"
        )
    return [f"extrapolation: {reason}" for reason in reasons]


def _check_sense(rate: float, batch: float, batch_tokens: int, tokens: float) -> None:
    """InputError for a learning rate or a batch that no run could use, whatever extrapolation was accepted."""
    if not (0 < rate < 1 and batch > 0):
        raise InputError(
            f"not recommended: the laws give a learning rate of {rate:.3g} and a batch of {batch:.3g} tokens there, which "
            "is no answer: the runs do not tell what happens at this size; add runs closer to it"
        )
    if batch > tokens / LEAST_STEPS:
        raise InputError(
            f"not recommended: the laws give a batch of {batch:,.0f} tokens, and a run of {tokens:.3g} tokens would have "
            f"{tokens / batch:.3g} steps, fewer than {LEAST_STEPS}: check that batch_size of the table counts sequences, "
            "not tokens (then fit again), and that --tokens is in tokens"
        )
    if batch_tokens > tokens / LEAST_STEPS:
        raise InputError(
            f"not recommended: --data-parallel x --micro-batch x --seq-len make steps of {batch_tokens:,} tokens, and a run "
            f"of {tokens:.3g} tokens would have {tokens / batch_tokens:.3g} of them, fewer than {LEAST_STEPS}: use fewer "
            "ranks, or train longer"
        )


def _excesses(samples: list[Surface], n_total: float, n_active: float, tokens: float, rate: Any, batch: Any) -> Any:
    """[samples, points]: the excess loss of each point (rate, batch) in each resampled surface, from 0 to `WINDOW`: beyond
    it a cubic is any number, and one resample that is far off would be the mean of all."""
    return np.clip([s.excess(n_total, n_active, tokens, rate, batch) for s in samples], 0.0, WINDOW)


def _widest(samples: list[Surface], surface: Surface, n_total: float, n_active: float, tokens: float) -> float:
    """The largest batch, in tokens, whose mean excess over resamples at its own best learning rate is under `WIDE`."""
    best_rate, best_batch = (float(x[0]) for x in surface.optimum(n_total, n_active, tokens))
    widest = best_batch
    for factor in np.geomspace(1, 30, 60):
        rates = best_rate * np.geomspace(0.3, 6, 40)
        batch = np.full_like(rates, best_batch * factor)
        if float(np.min(np.mean(_excesses(samples, n_total, n_active, tokens, rates, batch), axis=0))) > WIDE:
            break
        widest = best_batch * factor
    return widest


def recommend(fit: Fit, request: Request) -> dict[str, Any]:
    """Plain values under the documented keys. Raises InputError for a request that the runs cannot answer."""
    if fit.surface is None:
        raise InputError("the runs of this fit have no learning_rate and batch_size: only a loss law was fitted")
    if request.flops is not None:
        if fit.loss_law is None:
            raise InputError("--flops needs a loss law, which these runs do not give (too few sizes or durations)")
        shares = _shares(fit) if request.ratio is None else [request.ratio]
        ratio = min(shares, key=lambda share: compute_optimal(fit.loss_law, request.flops, share)[2])  # type: ignore[arg-type]
        n_total, tokens, _ = compute_optimal(fit.loss_law, request.flops, ratio)
        n_active = n_total * ratio
    else:
        if request.n_total is None or request.tokens is None:
            raise InputError("give --n-total and --tokens (and --n-active for MoE), or --flops")
        n_total, tokens = request.n_total, request.tokens
        n_active = n_total if request.n_active is None else request.n_active
    if n_active > n_total:
        raise InputError(f"--n-active {n_active:g} is larger than --n-total {n_total:g}")
    compute = 6 * n_active * tokens
    values = {
        "n_total": n_total,
        "n_active": n_active,
        "tokens": tokens,
        "compute": compute,
        "sparsity": n_active / n_total,
    }
    beyond = _beyond(fit, values)
    warnings = list(fit.warnings) + _refuse(fit, beyond, request.accept_extrapolation)
    samples = fit.surface_samples or [fit.surface]
    told = len(fit.surface_samples) >= 20 and fit.groups >= LEAST_GROUPS
    if fit.groups < LEAST_GROUPS:
        warnings.append(f"{fit.groups} groups of runs are too few to resample: no intervals")
    elif not told:
        warnings.append("fewer than 20 resamples: no intervals; fit with --samples 200")
    rate, batch = (float(x[0]) for x in fit.surface.optimum(n_total, n_active, tokens))
    optima = [s.optimum(n_total, n_active, tokens) for s in fit.surface_samples]
    unit = request.data_parallel * request.micro_batch
    sequences = max(unit, round(batch / request.seq_len / unit) * unit)
    batch_tokens = sequences * request.seq_len
    _check_sense(rate, batch, batch_tokens, tokens)
    if unit * request.seq_len > 1.5 * batch:
        warnings.append(
            f"one micro-batch on every rank ({unit * request.seq_len:,} tokens) is more than the best batch"
        )
    excesses = _excesses(samples, n_total, n_active, tokens, np.array([rate]), np.array([batch_tokens]))[:, 0]
    excess = float(np.mean(excesses))
    if np.median(excesses) >= WINDOW:
        warnings.append(
            f"the excess is {WINDOW:.0%} or more, where the surface is not trusted: the loss will be higher than predicted"
        )
    widest = _widest(samples, fit.surface, n_total, n_active, tokens)
    critical = bool(batch_tokens > widest)
    if critical:
        warnings.append(
            f"the batch is past the critical size: beyond {widest:,.0f} tokens it costs more than {WIDE:.1%} of loss"
        )
    predicted, loss_interval = None, None
    if fit.loss_law is not None:
        others = {"granularity": request.granularity or fit.granularity, "unique_tokens": request.unique_tokens}
        where = points(n_total, n_active, tokens, **others)
        predicted = float(fit.loss_law.at(where)[0]) * (1 + excess)
        losses = [float(law.at(where)[0]) for law in fit.loss_samples]
        loss_interval = _interval(losses) if told else None
    result: dict[str, Any] = {
        "n_total": n_total,
        "n_active": n_active,
        "tokens": tokens,
        "flops": compute,
        "learning_rate": rate,
        "batch_size_tokens": batch_tokens,
        "batch_size_sequences": sequences,
        "widest_batch_tokens": widest,
        "past_critical_batch": critical,
        "predicted_loss": predicted,
        "predicted_excess_loss": excess,
        "intervals": {
            "learning_rate": _interval([float(x[0][0]) for x in optima]) if told else None,
            "batch_size_tokens": _interval([float(x[1][0]) for x in optima]) if told else None,
            "predicted_loss": loss_interval,
            "predicted_excess_loss": _interval(list(excesses)) if told else None,
        },
        "extrapolation": beyond,
        "warnings": warnings,
    }
    if fit.step_law is not None:
        other_rate, other_batch = (float(x[0]) for x in fit.step_law.optimum(n_total, n_active, tokens))
        result["step_law"] = {"learning_rate": other_rate, "batch_size_tokens": other_batch}
    result["published"] = {}
    for name, law in PUBLISHED.items():
        other_rate, other_batch = (float(x[0]) for x in law().optimum(n_total, n_active, tokens))
        result["published"][name] = {"learning_rate": other_rate, "batch_size_tokens": other_batch}
    if request.flops is not None and fit.loss_law is not None:
        result["shapes"] = _shapes(fit, request.flops, n_active / n_total)
    return result


def _shares(fit: Fit) -> list[float]:
    """Activated shares that the runs cover, in halves from the largest; one where the law knows nothing of sparsity."""
    low, high = fit.ranges["sparsity"]
    if fit.loss_law is None or "N_total" not in fit.loss_law.text:
        return [high]
    shares = [high]
    while shares[-1] / 2 > 1.05 * low:
        shares.append(shares[-1] / 2)
    return [*shares, low] if low < shares[-1] / 1.05 else shares


def _shapes(fit: Fit, flops: float, wanted: float) -> list[dict[str, float]]:
    """The compute-optimal model at each share of activated parameters: what its share costs against the best one, and
    what half and twice its size cost."""
    assert fit.loss_law is not None
    law, rows = fit.loss_law, []
    for ratio in sorted({*_shares(fit), wanted}, reverse=True):
        n_total, tokens, loss = compute_optimal(law, flops, ratio)
        half = float(law.predict(n_total / 2, n_total * ratio / 2, tokens * 2)[0])
        twice = float(law.predict(n_total * 2, n_total * ratio * 2, tokens / 2)[0])
        rows.append(
            {
                "activated_share": ratio,
                "n_total": n_total,
                "n_active": n_total * ratio,
                "tokens": tokens,
                "loss": loss,
                "cost_of_half_size": half / loss - 1,
                "cost_of_twice_size": twice / loss - 1,
            }
        )
    best = min(row["loss"] for row in rows)
    return [row | {"cost_of_share": row["loss"] / best - 1} for row in rows]
