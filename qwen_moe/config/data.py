"""The data section: which tokens a run reads, in which order."""

import math
import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from qwen_moe.config.fields import (
    GivenPath,
    GivenPrefix,
    NonNegativeInt,
    OptionalSize,
    PositiveFloat,
    Section,
    Seed,
    Share,
    Size,
)

Learn = Literal["assistant", "last", "all"]
TooLong = Literal["error", "drop", "cut"]
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_PLAIN = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")


def split_weights(split: str) -> list[float]:
    """The shares of training, validation and test, which sum to 1. Raises ValueError unless ``split`` is one to three plain
    numbers (megatron-core reads 1e2 as 1 and 2) with a first one above 0."""
    parts = [part.strip() for part in split.split(",")]
    weights = [float(part) if _PLAIN.fullmatch(part) else -1.0 for part in parts]
    total = sum(weights)
    if len(parts) > 3 or min(weights) < 0 or weights[0] == 0 or total == math.inf:
        raise ValueError(
            f"{split!r:.60} is not of the form 'train,validation,test': give up to three plain numbers, the first above 0"
        )
    return [*(weight / total for weight in weights), 0.0, 0.0][:3]


class Dataset(Section):
    """One `.bin/.idx` pair (`prefix` is its path without the suffix) and its weight in the blend.

    Of conversations and pairs, weights that are not all 1 are shares of the examples of an epoch, which has as many as all
    sets together; else every set is read ``passes`` times in each epoch."""

    prefix: GivenPrefix
    weight: PositiveFloat = 1.0
    passes: Size = 1


class Prepare(Section):
    """Data that `qwen-moe train` prepares first if it does not exist: text as `qwen-moe data prepare` would, and
    conversations or pairs (where the objective learns from them) as `qwen-moe data chat` would, with its ``learn`` and
    ``too_long``."""

    input: tuple[str, ...] = Field(min_length=1)
    output: GivenPrefix
    train_tokenizer: bool = False
    vocab_size: OptionalSize = 0
    text_key: str = "text"
    learn: Learn = "assistant"
    too_long: TooLong = "error"


class DataConfig(Section):
    """The tokens to read and their order. ``split``: Megatron's train,validation,test weights over documents.
    ``validation_sets``: further validation data by name, such as one blend for each domain, each with a loss of its own.
    ``order_tokens``: the training length for which the order is drawn; 0 is the run's own, and a branch sets its trunk's.
    ``too_long``: what to do with a conversation or pair that is longer than a sequence: stop, or leave it out.
    ``long_share``: the share of training sequences (and so of tokens) from documents of at least ``sequence_length`` tokens;
    the others come from shorter documents. 0 takes all documents as they come."""

    prepare: Prepare | None = None
    train: tuple[Dataset, ...] = ()
    validation: tuple[Dataset, ...] = ()
    validation_sets: dict[str, tuple[Dataset, ...]] = Field(default={})
    tokenizer: GivenPath | None = None
    sequence_length: Size
    split: str = "99,1,0"
    seed: Seed = 1234
    order_tokens: NonNegativeInt = 0
    long_share: Share = 0.0
    too_long: Literal["error", "drop"] = "error"
    respect_document_boundaries: bool = False
    mask_end_of_document: bool = False

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str) -> str:
        split_weights(split)
        return split

    @field_validator("validation_sets")
    @classmethod
    def _check_sets(cls, sets: dict[str, tuple[Dataset, ...]]) -> dict[str, tuple[Dataset, ...]]:
        for name, datasets in sets.items():
            if not _SET_NAME.fullmatch(name):
                raise ValueError(f"{name!r:.60} is not a name: give up to 40 letters, digits, _, - and dots")
            if not datasets:
                raise ValueError(f"{name} is empty: give at least one prefix, or leave it out")
        return sets

    @property
    def all_validation(self) -> tuple[Dataset, ...]:
        """The data of every validation set."""
        return self.validation + tuple(one for datasets in self.validation_sets.values() for one in datasets)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for blend in (self.train, self.validation, *self.validation_sets.values()):
            if sum(dataset.weight for dataset in blend) == math.inf:
                raise ValueError("the weights of a blend sum to infinity: they are shares, so give smaller numbers")
        if self.prepare is not None and self.prepare.train_tokenizer == (self.tokenizer is not None):
            raise ValueError(
                "give either data.prepare.train_tokenizer: true (with vocab_size) or data.tokenizer, not both or neither"
            )
        return self
