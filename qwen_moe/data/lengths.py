"""The mix of lengths: which training documents are long, and which samples come from them."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from launchers.counted import counted
from qwen_moe.config import DataConfig, Dataset
from qwen_moe.config.data import split_weights
from qwen_moe.data.content import document_lengths
from qwen_moe.errors import UserError

ALL = "1,0,0"  # the split of which every document is for training


def parts_of(split: str, documents: int) -> list[int]:
    """How many of so many documents are for training, validation and test, as megatron-core counts them."""
    edges = [round(edge * documents) for edge in itertools.accumulate(split_weights(split), initial=0.0)]
    return [after - first for first, after in itertools.pairwise(edges)]


def has_validation(split: str, documents: Sequence[int]) -> bool:
    """True if every dataset, of that many documents, has at least one left for validation."""
    share = split_weights(split)[1]
    # The share, rounded, may be a document where the part from edge to edge has none.
    return all(round(share * count) >= 1 and count >= 2 and parts_of(split, count)[1] for count in documents)


def used_split(split: str, documents: Sequence[int]) -> str:
    """``split`` as it is used for datasets of so many documents: without validation documents in one of them, there is no
    validation, and all documents but those of the test are for training."""
    if has_validation(split, documents):
        return split
    train, validation, test = split_weights(split)
    without = f"{train + validation:.15f},0,{test:.15f}"
    return without if any(parts_of(without, count)[2] for count in documents) else ALL


def training_lengths(config: DataConfig, train: Sequence[Dataset]) -> list[np.ndarray]:
    """Tokens of every training document, by dataset: those that `data.split` does not keep for validation or test."""
    lengths = [document_lengths(dataset.prefix) for dataset in train]
    if config.validation:
        return lengths
    split = used_split(config.split, [len(found) for found in lengths])
    return [found[: parts_of(split, len(found))[0]] for found in lengths]


def check_parts(config: DataConfig, train: Sequence[Dataset]) -> None:
    """Raise UserError if a dataset has no token to train on, or to validate on: megatron-core would count epochs forever."""
    for dataset, found in zip(train, training_lengths(config, train), strict=True):
        lengths = document_lengths(dataset.prefix)
        if found.any():
            continue
        if not lengths.any():
            raise UserError(f"{dataset.prefix} has no tokens: give data with text, or leave it out")
        raise UserError(
            f"data.split {config.split!r} leaves nothing of {dataset.prefix} to train on, which has "
            f"{counted(len(lengths), 'document')}: give training a larger share, or give more documents"
        )
    for dataset in config.validation:
        if not document_lengths(dataset.prefix).any():
            raise UserError(f"{dataset.prefix} has no tokens: give validation data with text, or leave it out")


def long_and_short(config: DataConfig, train: Sequence[Dataset]) -> tuple[tuple[Dataset, ...], tuple[Dataset, ...]]:
    """The datasets that have long training documents, and those that have shorter ones. Raises UserError if the mix that
    ``config`` asks for needs documents that none of them has."""
    lengths, least = training_lengths(config, train), config.sequence_length
    long = tuple(d for d, found in zip(train, lengths, strict=True) if (found >= least).any())
    short = tuple(d for d, found in zip(train, lengths, strict=True) if (found < least).any())
    asked = (
        f"data.long_share {config.long_share:g} asks for documents of at least data.sequence_length {least:,} tokens"
    )
    if not long:
        longest = max((int(found.max(initial=0)) for found in lengths), default=0)
        raise UserError(
            f"{asked}, but the longest training document of {_names(train)} has {longest:,}: lower data.sequence_length, "
            "add data with longer documents to data.train, or leave long_share out to take all documents as they come"
        )
    if not short and config.long_share < 1:
        shortest = min(int(found.min()) for found in lengths if len(found))
        raise UserError(
            f"{asked} and, for the other sequences, for shorter ones, but the shortest training document of {_names(train)} "
            f"has {shortest:,}: set long_share to 1, or add data with shorter documents to data.train"
        )
    return long, short


def _names(train: Sequence[Dataset]) -> str:
    paths: list[Path] = [dataset.prefix for dataset in train]
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def long_samples(share: float, samples: int) -> int:
    """How many of the first ``samples`` come from long documents: the share, rounded down. So every stretch of samples has
    its share to within one sample."""
    return samples * Fraction(str(share)) // 1


class Mix:
    """``share`` of the samples from ``long``, in its order, and the others from ``short``. A part of which no sample is
    needed is None."""

    def __init__(self, long: Any, short: Any, share: float, samples: int) -> None:
        self.long, self.short, self.share, self.samples = long, short, share, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        before = long_samples(self.share, index)
        if long_samples(self.share, index + 1) > before:
            return self.long[before]
        return self.short[index - before]
