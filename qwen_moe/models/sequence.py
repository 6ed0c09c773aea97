"""The split of a sequence over devices as the layers see it, and the case without a split.

The model's input may cover a part of a sequence ("given"); between layers a device may hold a part of that ("held").
"""

from typing import Protocol

import torch


class SequencePart(Protocol):
    """The part of each sequence that this device holds between layers. `parallel.sequence` implements real splits."""

    def given_length(self, held: int) -> int:
        """The length of the model's input (token ids, document ids), from the length held between layers."""

    def whole_length(self, held: int) -> int:
        """The length of the whole sequence, from the length held between layers."""

    def positions(self, given: int, device: torch.device) -> torch.Tensor:
        """``[given]``: the positions of the model's input in the sequence."""

    def held(self, field: torch.Tensor) -> torch.Tensor:
        """``[B, given, ...] -> [B, held, ...]``: the held tokens of a field of the model's input."""

    def held_of(self, whole: torch.Tensor) -> torch.Tensor:
        """``[B, S] -> [B, held]``: the held tokens of a field of whole sequences."""

    @property
    def segments(self) -> int:
        """The number of equal, contiguous segments that the held tokens consist of."""

    def earlier(self, counts: torch.Tensor) -> torch.Tensor:
        """For each held segment, the sum of ``counts [B, segments, ...]`` over all earlier segments, on any device."""


class WholeSequence:
    """Every sequence is whole on this device."""

    def given_length(self, held: int) -> int:
        return held

    def whole_length(self, held: int) -> int:
        return held

    def positions(self, given: int, device: torch.device) -> torch.Tensor:
        return torch.arange(given, device=device)

    def held(self, field: torch.Tensor) -> torch.Tensor:
        return field

    def held_of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole

    @property
    def segments(self) -> int:
        return 1

    def earlier(self, counts: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(counts)
