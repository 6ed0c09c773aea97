"""Recognizes runs that ended too early to say which learning rate and batch size are best.

In Step Law's sweeps (2,000 steps of warm-up), runs with fewer than 2,500 steps lose more than the surface that describes all
others: by a median of 0.6 to 1.7% from 1,200 to 2,500 steps and of 4% below; from 2,500 steps on the median is within 0.3%.
Warm-up was then at most 80% of the run. Their groups have 0.9 tokens per parameter and more; nothing is known below.
"""

import pandas as pd

from scaling_laws.counted import counted
from scaling_laws.errors import InputError

MOST_WARM_UP = 0.8  # of a run's tokens
LEAST_TOKENS = 1.0  # per activated parameter


def without_early(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """(the runs that are late enough, notes on those that are left out). Raises InputError if no run remains."""
    warming = pd.Series(False, index=frame.index)
    if "warmup_tokens" in frame:
        warming = frame["warmup_tokens"] / frame["tokens"] > MOST_WARM_UP
    short = frame["tokens"] / frame["n_active"] < LEAST_TOKENS
    notes = []
    for early, told in (
        (warming, f"whose warm-up takes more than {MOST_WARM_UP:.0%} of their tokens"),
        (short, f"with less than {LEAST_TOKENS:g} token per activated parameter"),
    ):
        if early.any():
            notes.append(
                f"{int(early.sum())} of {counted(len(frame), 'run')} {'is' if early.sum() == 1 else 'are'} left out, "
                f"because runs {told} say nothing about longer ones (first: {frame.loc[early.idxmax(), 'source']})"
            )
    kept = frame[~(warming | short)]
    if kept["loss"].notna().sum() == 0:
        raise InputError(
            f"every run ended too early: {'; '.join(notes) or 'none has a loss'}. Train longer, or with a shorter warm-up"
        )
    return kept, notes
