"""The interface that brings tokens to their experts and back, and its version for one device.

Shapes: T tokens, D hidden, K top-k, N rows that arrive at this device's L experts.
"""

from typing import NamedTuple, Protocol

import torch

from qwen_moe.models.ops.permute import Rows, combine, number_dropped, permute_weights, sort_by_expert


class Arrived(NamedTuple):
    """What the experts of this device compute."""

    states: torch.Tensor  # [M, D]
    rows: Rows  # which of the states each of the N rows is, sorted by expert
    weights: torch.Tensor  # [N]


class Route(Protocol):
    """The way of some tokens' rows to their experts and back. Each step takes what the step before it returned, and waits
    for the rows if they travel: `Dispatcher.send`, `receive`, experts, `send_back`, `combine`."""

    def receive(self, sent: torch.Tensor) -> Arrived:
        """What arrives here."""
        ...

    def send_back(self, outputs: torch.Tensor) -> torch.Tensor:
        """Begin to return ``outputs [N, D]``, in the order of `receive`."""
        ...

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """The sums ``[T, D]`` of the rows that have come back."""
        ...


class Dispatcher(Protocol):
    """Brings tokens to experts and results back."""

    def send(
        self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, drops: bool
    ) -> tuple[torch.Tensor, Route]:
        """Begin to send ``x [T, D]`` to the experts ``indices [T, K]``, with ``weights [T, K]``. With ``drops``, an index
        equal to the number of experts marks a dropped choice."""
        ...


class LocalRoute:
    """Rows that stay on this device."""

    def __init__(self, rows: Rows, weights: torch.Tensor) -> None:
        self.rows, self.weights = rows, weights

    def receive(self, sent: torch.Tensor) -> Arrived:
        return Arrived(sent, self.rows, self.weights)

    def send_back(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        return combine(rows, self.rows)


class LocalDispatcher:
    """All experts are on this device: sort the rows, run the experts, restore the order. Other dispatchers must equal it."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def send(
        self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, drops: bool
    ) -> tuple[torch.Tensor, Route]:
        rows, choice = sort_by_expert(indices, self.num_experts + drops)
        if drops:  # they are last, and their sums get nothing
            kept = indices.numel() - number_dropped(rows.counts)
            rows, choice = Rows(rows.token[:kept], rows.row, rows.counts[:-1]), choice[:kept]
        return x, LocalRoute(rows, permute_weights(weights, choice, rows.row))
