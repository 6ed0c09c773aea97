"""The interface that brings tokens to their experts and back, and its version for one device.

Shapes: T tokens, D hidden, K top-k, N = T * K rows sorted by expert, M rows that arrive at this device's L experts.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from qwen_moe.models.ops.permute import Permutation, combine, permute, sort_by_expert


class Route(Protocol):
    """The way of some tokens' rows to their experts and back. Each step takes what the step before it returned, and waits
    for the rows if they travel: `Dispatcher.send`, `receive`, experts, `send_back`, `combine`."""

    def receive(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows ``[M, D]`` that arrive here, sorted by expert, and their counts ``[L]``."""
        ...

    def send_back(self, outputs: torch.Tensor) -> torch.Tensor:
        """Begin to return ``outputs [M, D]``, in the order of `receive`."""
        ...

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The sums ``[T, D]`` of the rows that have come back, with ``weights [T, K]``."""
        ...


class Dispatcher(Protocol):
    """Brings tokens to experts and results back."""

    def send(self, x: torch.Tensor, indices: torch.Tensor, drops: bool) -> tuple[torch.Tensor, Route]:
        """Begin to send ``x [T, D]`` to the experts ``indices [T, K]``. With ``drops``, an index equal to the number of
        experts marks a dropped choice, whose weight is 0."""
        ...


class LocalRoute:
    """Rows that stay on this device."""

    def __init__(self, order: Permutation, drops: bool) -> None:
        self.order, self.drops = order, drops

    def receive(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.drops:
            return rows, self.order.counts
        # Dropped choices are sorted to the end.
        return rows[: rows.shape[0] - int(self.order.counts[-1])], self.order.counts[:-1]

    def send_back(self, outputs: torch.Tensor) -> torch.Tensor:
        lost = self.order.token.numel() - outputs.shape[0]
        return F.pad(outputs, (0, 0, 0, lost)) if self.drops else outputs  # dropped choices stay zero

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return combine(rows, weights, self.order)


class LocalDispatcher:
    """All experts are on this device: sort the rows, run the experts, restore the order. Other dispatchers must equal it."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def send(self, x: torch.Tensor, indices: torch.Tensor, drops: bool) -> tuple[torch.Tensor, Route]:
        order = sort_by_expert(indices, self.num_experts + drops)
        return permute(x, order), LocalRoute(order, drops)
