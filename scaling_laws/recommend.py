"""Recommends learning rate and batch size for a run to launch, predicts its loss, and says how far to trust them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from scaling_laws.counted import counted
from scaling_laws.errors import InputError
from scaling_laws.fitting import Fit
from scaling_laws.forms import points
from scaling_laws.loss_law import LossLaw, compute_optimal
from scaling_laws.prior_text import prior_of
from scaling_laws.surface import PUBLISHED, WINDOW, Surface

WIDE = 1e-3  # excess loss that a wide batch may cost over the best batch
LEAST_GROUPS = 5  # with fewer groups, resamples are too much alike to give an interval
LEAST_SAMPLES = 20  # with fewer resamples, no interval is given
MOST_COMPUTE, MOST_OTHER = 1000.0, 30.0  # times outside the runs; beyond, --accept-extrapolation is needed
SURE_LOSS = 0.02  # error of held-out losses, above which a predicted loss is doubted
LEAST_STEPS = 50  # a batch size that leaves a run fewer steps is not recommended


@dataclass(frozen=True, kw_only=True)
class Request:
    """The run to launch, given by its sizes or by ``flops`` = 6 N_active D. With ``flops``, ``ratio`` is N_active / N_total,
    by default the best one that the runs cover."""

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
    return [float(x) for x in np.percentile(values, [2.5, 97.5])] if len(values) >= LEAST_SAMPLES else None


class _Target(NamedTuple):
    """The run to recommend for, in the order of the laws' arguments: parameters, activated parameters, tokens."""

    n_total: float
    n_active: float
    tokens: float

    @property
    def compute(self) -> float:
        return 6 * self.n_active * self.tokens


def _others(fit: Fit, request: Request) -> dict[str, Any]:
    """What some forms of the loss law use besides the sizes."""
    return {"granularity": request.granularity or fit.granularity, "unique_tokens": request.unique_tokens}


def _unused(fit: Fit, request: Request, target: _Target) -> list[str]:
    """Notes on what the request says, and the loss law does not use."""
    form, notes = fit.loss_law.form if fit.loss_law is not None else "", []
    if request.unique_tokens is not None and request.unique_tokens < target.tokens and form != "data_constrained":
        notes.append(
            f"--unique-tokens {request.unique_tokens:g} changes nothing: only the loss law data_constrained, which runs "
            "that repeat their data tell, counts repeated tokens. A run that repeats its data loses more than is predicted"
        )
    if request.granularity is not None and form != "krajewski":
        notes.append(
            f"--granularity {request.granularity:g} changes nothing: only the loss law krajewski, which runs of 3 "
            "granularities tell, uses it"
        )
    return notes


def _target(fit: Fit, request: Request) -> _Target:
    """The sizes in the request, or the compute-optimal ones for its FLOPs. Raises InputError when it gives neither."""
    if request.flops is not None:
        if fit.loss_law is None:
            raise InputError("--flops needs a loss law, which these runs do not give (too few sizes or durations)")
        law, flops, others = fit.loss_law, request.flops, _others(fit, request)
        shares = _shares(fit) if request.ratio is None else [request.ratio]
        optima = _optima(law, flops, shares, others)
        ratio = min(optima, key=lambda share: optima[share][2])
        n_total, tokens, _ = optima[ratio]
        n_active = n_total * ratio
    else:
        if request.n_total is None or request.tokens is None:
            raise InputError("give --n-total and --tokens (and --n-active for MoE), or --flops")
        n_total, tokens = request.n_total, request.tokens
        n_active = n_total if request.n_active is None else request.n_active
    if n_active > n_total:
        raise InputError(f"--n-active {n_active:g} is larger than --n-total {n_total:g}")
    return _Target(n_total, n_active, tokens)


def quantities(n_total: float, n_active: float, tokens: float) -> dict[str, float]:
    """The quantities of a run whose distance from the small runs is limited."""
    return {
        "n_total": n_total,
        "n_active": n_active,
        "tokens": tokens,
        "compute": 6 * n_active * tokens,
        "sparsity": n_active / n_total,
        "tokens_per_parameter": tokens / n_total,
    }


def times_outside(ranges: Mapping[str, Sequence[float]], target: Mapping[str, float]) -> dict[str, float]:
    """How many times each of the `quantities` of a target is outside ``ranges`` (least, most); 1 inside it."""
    return {name: max(1.0, value / ranges[name][1], ranges[name][0] / value) for name, value in target.items()}


def too_far(outside: Mapping[str, float]) -> list[str]:
    """A description of each quantity that is so far outside the runs that --accept-extrapolation is needed."""
    limits = {name: MOST_COMPUTE if name == "compute" else MOST_OTHER for name in outside}
    return [
        f"{name} is {ratio:,.0f} times outside the runs (limit {limits[name]:,.0f})"
        for name, ratio in outside.items()
        if ratio > limits[name]
    ]


def _refuse(fit: Fit, beyond: dict[str, float], accepted: bool) -> list[str]:
    """Warnings about an extrapolation that the user accepted. Raises InputError for one that was not accepted."""
    reasons = []
    if fit.sizes < 3:
        reasons.append(f"the runs have {counted(fit.sizes, 'size')}, fewer than 3")
    if fit.durations < 2:
        reasons.append("all runs have the same tokens per parameter")
    reasons += too_far(beyond)
    if reasons and not accepted:
        raise InputError(
            f"not recommended: {'; '.join(reasons)}. Add runs closer to the request (several sizes and durations), or give "
            "--accept-extrapolation"
        )
    return [f"extrapolation: {reason}" for reason in reasons]


def _check_sense(rate: float, batch: float, batch_tokens: int, tokens: float) -> None:
    """Raises InputError for a learning rate or batch that no run could use, even if extrapolation was accepted."""
    if not (0 < rate < 1 and batch > 0):
        raise InputError(
            f"not recommended: the laws give a learning rate of {rate:.3g} and a batch of {batch:.3g} tokens there, which "
            "no run can use: the runs are too far from this size; add runs closer to it"
        )
    if batch > tokens / LEAST_STEPS:
        raise InputError(
            f"not recommended: the laws give a batch of {batch:,.0f} tokens, and a run of {tokens:.3g} tokens would have "
            f"{tokens / batch:.3g} steps, fewer than {LEAST_STEPS}: check that the table's batch_size counts sequences, "
            "not tokens (then fit again), and that --tokens is in tokens"
        )
    if batch_tokens > tokens / LEAST_STEPS:
        raise InputError(
            f"not recommended: --data-parallel x --micro-batch x --seq-len make a step of {batch_tokens:,} tokens, and a "
            f"run of {tokens:.3g} tokens would have {tokens / batch_tokens:.3g} steps, fewer than {LEAST_STEPS}: use fewer "
            "ranks, or train longer"
        )


def _why_no_intervals(fit: Fit) -> list[str]:
    """A note if there are too few resamples for intervals, or if they are too much alike."""
    if fit.groups < LEAST_GROUPS:
        return [f"{counted(fit.groups, 'group of runs is', 'groups of runs are')} too few to resample: no intervals"]
    if len(fit.surface_samples) < LEAST_SAMPLES:
        return [f"fewer than {LEAST_SAMPLES} resamples: no intervals; fit with --samples 200"]
    return []


def _excesses(samples: list[Surface], target: _Target, rate: Any, batch: Any) -> Any:
    """The excess loss [samples, points] of each point (rate, batch) in each resampled surface, clipped to 0 ... `WINDOW`.
    Beyond `WINDOW` the cubic can take any value, and one resample that is far off would dominate the mean."""
    return np.clip([s.excess(*target, rate, batch) for s in samples], 0.0, WINDOW)


def _widest(samples: list[Surface], surface: Surface, target: _Target) -> float:
    """The largest batch, in tokens, whose mean excess over resamples, at its own best learning rate, is at most `WIDE` above
    that of the best batch."""
    best_rate, best_batch = _optimum(surface, target)
    widest, least = best_batch, np.inf
    for factor in np.geomspace(1, 30, 60):
        rates = best_rate * np.geomspace(0.3, 6, 40)
        batch = np.full_like(rates, best_batch * factor)
        excess = float(np.min(np.mean(_excesses(samples, target, rates, batch), axis=0)))
        least = min(least, excess)
        if excess > least + WIDE:
            break
        widest = best_batch * factor
    return widest


def _optimum(surface: Surface, target: _Target) -> tuple[float, float]:
    """(learning rate, batch size in tokens) that minimise the loss."""
    rate, batch = surface.optimum(*target)
    return float(rate[0]), float(batch[0])


def _batch_warnings(batch_tokens: int, widest: float, excesses: np.ndarray) -> list[str]:
    """Warnings about a batch whose excess loss is untrustworthy, or too large at any learning rate. ``excesses`` is the
    excess loss in each resampled surface."""
    warnings = []
    if np.median(excesses) >= WINDOW:
        warnings.append(
            f"the excess is {WINDOW:.0%} or more, where the surface is not trusted: the loss will be higher than predicted"
        )
    if batch_tokens > widest:
        warnings.append(
            f"the batch is past the critical size: beyond {widest:,.0f} tokens it costs more than {WIDE:.1%} of loss"
        )
    return warnings


def _losses(fit: Fit, request: Request, target: _Target) -> tuple[float | None, list[float]]:
    """(loss at the optimum, that loss in each resample); (None, []) without a loss law."""
    if fit.loss_law is None:
        return None, []
    where = points(*target, **_others(fit, request))
    return float(fit.loss_law.at(where)[0]), [float(law.at(where)[0]) for law in fit.loss_samples]


def _with_excess(losses: list[float], excesses: np.ndarray) -> list[float]:
    """Each sample's loss at the recommended point, which is above that at its optimum by its excess there. Where a sample
    has no loss law, the others are above by the mean."""
    above = excesses if len(losses) == len(excesses) else np.full(len(losses), np.mean(excesses))
    return [float(loss * (1 + excess)) for loss, excess in zip(losses, above, strict=True)]


def _loss_doubts(fit: Fit) -> list[str]:
    """A warning if the loss law misses runs of more compute than it was fitted to. The interval of the predicted loss comes
    from refits of the same form, so it does not show that the form is wrong."""
    rows = [row for row in fit.validation if row["compute_ratio"] > 1 and row.get("loss_error", 0.0) > SURE_LOSS]
    if fit.loss_law is None or not rows:
        return []
    worst = max(rows, key=lambda row: float(row["loss_error"]))
    return [
        f"fitted without {worst['held_out']}, {worst['compute_ratio']:.2g} times the compute of the other runs, the loss "
        f"law is off by {worst['loss_error']:.1%} there: the predicted loss may be, too, and its interval does not show it"
    ]


def _other_laws(fit: Fit, target: _Target) -> dict[str, Any]:
    """The recommendations of the Step Law fitted to these runs, if any, and of the published laws."""

    def optimum(law: Surface) -> dict[str, float]:
        rate, batch = _optimum(law, target)
        return {"learning_rate": rate, "batch_size_tokens": batch}

    fitted = {"step_law": optimum(fit.step_law)} if fit.step_law is not None else {}
    return {**fitted, "published": {name: optimum(law()) for name, law in PUBLISHED.items()}}


def recommend(fit: Fit, request: Request) -> dict[str, Any]:
    """The recommendation, as plain values under documented keys. Raises InputError if the runs cannot answer the request."""
    if fit.surface is None:
        raise InputError("the runs of this fit have no learning_rate and batch_size: only a loss law was fitted")
    target = _target(fit, request)
    beyond = times_outside(fit.ranges, quantities(*target))
    warnings = list(fit.warnings) + _refuse(fit, beyond, request.accept_extrapolation)
    no_intervals = _why_no_intervals(fit)
    warnings += no_intervals
    samples = fit.surface_samples or [fit.surface]
    optima = [_optimum(sample, target) for sample in fit.surface_samples]
    rate, batch = _optimum(fit.surface, target)
    unit = request.data_parallel * request.micro_batch
    sequences = max(unit, round(batch / request.seq_len / unit) * unit)
    batch_tokens = sequences * request.seq_len
    _check_sense(rate, batch, batch_tokens, target.tokens)
    if unit * request.seq_len > 1.5 * batch:
        warnings.append(
            f"one micro-batch on every rank ({unit * request.seq_len:,} tokens) is more than the best batch"
        )
    excesses = _excesses(samples, target, np.array([rate]), np.array([batch_tokens]))[:, 0]
    widest = _widest(samples, fit.surface, target)
    warnings += _batch_warnings(batch_tokens, widest, excesses)
    excess = float(np.mean(excesses))
    loss, losses = _losses(fit, request, target)
    warnings += _loss_doubts(fit) + _unused(fit, request, target)
    resampled = {
        "learning_rate": [optimum[0] for optimum in optima],
        "batch_size_tokens": [optimum[1] for optimum in optima],
        "predicted_loss": _with_excess(losses, excesses),
        "predicted_excess_loss": list(excesses),
    }
    result: dict[str, Any] = {
        **target._asdict(),
        "flops": target.compute,
        "learning_rate": rate,
        "batch_size_tokens": batch_tokens,
        "batch_size_sequences": sequences,
        "widest_batch_tokens": widest,
        "past_critical_batch": bool(batch_tokens > widest),
        "predicted_loss": None if loss is None else loss * (1 + excess),
        "predicted_excess_loss": excess,
        "intervals": {name: None if no_intervals else _interval(values) for name, values in resampled.items()},
        "extrapolation": beyond,
        "prior": prior_of(fit),
        "warnings": warnings,
        **_other_laws(fit, target),
    }
    if request.flops is not None:
        result["shapes"] = _shapes(fit, request.flops, target.n_active / target.n_total, _others(fit, request))
    return result


def _shares(fit: Fit) -> list[float]:
    """Activated shares that the runs cover, each half of the one before; one share if the law does not use sparsity."""
    low, high = fit.ranges["sparsity"]
    if fit.loss_law is None or "N_total" not in fit.loss_law.text:
        return [high]
    shares = [high]
    while shares[-1] / 2 > 1.05 * low:
        shares.append(shares[-1] / 2)
    return [*shares, low] if low < shares[-1] / 1.05 else shares


def _optima(
    law: LossLaw, flops: float, shares: Sequence[float], others: Mapping[str, Any]
) -> dict[float, tuple[float, float, float]]:
    """`compute_optimal` of each share that has one. Raises InputError if none does."""
    found: dict[float, tuple[float, float, float]] = {}
    for share in shares:
        try:
            found[share] = compute_optimal(law, flops, share, **others)
        except InputError:
            if share == shares[-1] and not found:
                raise
    return found


def _shapes(fit: Fit, flops: float, wanted: float, others: Mapping[str, Any]) -> list[dict[str, float]]:
    """The compute-optimal model at each share of activated parameters, with the loss that it costs over the best share,
    and what half and twice its size would cost."""
    assert fit.loss_law is not None
    law, rows = fit.loss_law, []
    optima = _optima(law, flops, sorted({*_shares(fit), wanted}, reverse=True), others)
    for ratio, (n_total, tokens, loss) in optima.items():
        half = float(law.predict(n_total / 2, n_total * ratio / 2, tokens * 2, **others)[0])
        twice = float(law.predict(n_total * 2, n_total * ratio * 2, tokens / 2, **others)[0])
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
