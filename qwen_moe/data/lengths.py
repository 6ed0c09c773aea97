"""The mix of lengths: which training documents are long, and which samples come from them."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from qwen_moe.config import DataConfig, Dataset
from qwen_moe.data.content import document_lengths
from qwen_moe.errors import UserError


def has_validation(split: str, documents: Sequence[int]) -> bool:
    """True if every dataset, of that many documents, has at least one left for validation."""
    weights = [float(part) for part in split.split(",")]
    share = weights[1] / sum(weights) if len(weights) > 1 else 0.0
    return all(round(share * count) >= 1 and count >= 2 for count in documents)


def training_lengths(config: DataConfig, train: Sequence[Dataset]) -> list[np.ndarray]:
    """Tokens of every training document, by dataset: those that `data.split` does not keep for validation."""
    lengths = [document_lengths(dataset.prefix) for dataset in train]
    if config.validation or not has_validation(config.split, [len(found) for found in lengths]):
        return lengths
    weights = [float(part) for part in config.split.split(",")]
    return [found[: round(weights[0] / sum(weights) * len(found))] for found in lengths]


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
