"""Checks whether two sample orders begin with the same samples, from megatron-core's index arrays alone."""

from typing import Any

import numpy as np

from qwen_moe.data.lengths import Mix, long_samples

_ROWS = 1 << 22  # rows compared at a time, because the arrays of a long run do not fit into memory


def begin_alike(one: Any, other: Any, samples: int) -> bool:
    """Whether the first ``samples`` of two GPTDatasets, or of two blends, over the same files are the same in the same
    order. False if one of them has fewer samples."""
    if min(len(one), len(other)) < samples:
        return False
    if samples == 0:
        return True
    if isinstance(one, Mix):
        long = long_samples(one.share, samples)
        parts = ((one.long, other.long, long), (one.short, other.short, samples - long))
        return all(count == 0 or begin_alike(a, b, count) for a, b, count in parts)
    if hasattr(one, "dataset_index"):
        return _blends_begin_alike(one, other, samples)
    if not _same(one.shuffle_index, other.shuffle_index, samples):
        return False
    last = int(np.max(one.shuffle_index[:samples])) + 1  # sample k goes from row k of sample_index to row k + 1
    if not _same(one.sample_index, other.sample_index, last + 1):
        return False
    return _same(one.document_index, other.document_index, int(one.sample_index[last][0]) + 1)


def _blends_begin_alike(one: Any, other: Any, samples: int) -> bool:
    if not _same(one.dataset_index, other.dataset_index, samples):
        return False
    if not _same(one.dataset_sample_index, other.dataset_sample_index, samples):
        return False
    # Each dataset of a blend supplies its samples in order, so compare as many as the beginning takes from it.
    counts = np.bincount(one.dataset_index[:samples], minlength=len(one.datasets))
    return all(begin_alike(a, b, int(n)) for a, b, n in zip(one.datasets, other.datasets, counts, strict=True))


def _same(one: Any, other: Any, rows: int) -> bool:
    return all(
        np.array_equal(one[start : min(start + _ROWS, rows)], other[start : min(start + _ROWS, rows)])
        for start in range(0, rows, _ROWS)
    )
