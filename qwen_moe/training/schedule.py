"""Learning rate as a pure function of tokens, so that a resumed run needs no scheduler state."""

import math

from qwen_moe.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0).

    Warm-up is linear in the tokens seen after the step, and decay follows the tokens seen before it, so no step has rate
    zero. ``cosine`` decays from the end of the warm-up to the end of training; ``wsd`` (arXiv 2404.06395) is constant until
    the last ``decay_tokens``; ``constant`` does not decay. ``config``: of a run without stages, or of the stage of
    ``step``; `Place` says which tokens of the run its schedule spans.
    """
    assert not config.stages
    schedule, peak, place = config.schedule, config.optimizer.learning_rate, config.place
    floor, total = schedule.min_learning_rate, place.rates_tokens
    before = config.tokens_before(step) - place.rates_from
    after = before + config.tokens_per_step
    if after <= schedule.warmup_tokens:
        return peak * after / schedule.warmup_tokens
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        start = schedule.warmup_tokens
        shape = "cosine"
    else:
        start = total - schedule.decay_tokens
        shape = schedule.decay_shape
    done = min(1.0, max(0.0, (before - start) / max(1, total - start)))
    return floor + (peak - floor) * _remaining(done, shape)


def first_other_rate(
    before: RunConfig, after: RunConfig, steps: int, tolerance: float = 0.0, first: int = 0
) -> int | None:
    """The first of the optimizer steps from ``first`` (from 0) until ``steps`` whose learning rates differ by more than
    ``tolerance`` times the rate; None if there is none."""
    for step in range(first, steps):
        rate = learning_rate(before, step)
        if abs(rate - learning_rate(after, step)) > tolerance * rate:
            return step
    return None


def _remaining(done: float, shape: str) -> float:
    """The share of (peak - floor) that is left after share ``done`` of the decay."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if shape == "sqrt":
        return 1 - math.sqrt(done)  # arXiv 2405.18392
    return 1 - done
