"""What layers ask about the split of a sequence over ranks, and the answers where it is whole on this device."""

from typing import Protocol

import torch


class SequencePart(Protocol):
    """The part of each sequence that this device holds between layers; `parallel.sequence` has the split ones."""

    def given_length(self, held: int) -> int:
        """The length of what the model is given (token ids, documents), from what is held between layers."""

    def whole_length(self, held: int) -> int:
        """The length of the whole sequence, from what is held between layers."""

    def positions(self, given: int, past: int, device: torch.device) -> torch.Tensor:
        """``[given]``: the positions in the sequence of what the model is given, after ``past`` earlier tokens."""

    def earlier(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of ``counts`` over all devices that hold earlier parts of the same sequences."""


class WholeSequence:
    """Every sequence is whole on this device."""

    def given_length(self, held: int) -> int:
        return held

    def whole_length(self, held: int) -> int:
        return held

    def positions(self, given: int, past: int, device: torch.device) -> torch.Tensor:
        return torch.arange(past, past + given, device=device)

    def earlier(self, counts: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(counts)
