"""The interface that brings tokens to their experts and back, and its version for one device.

Shapes: T tokens, D hidden, K top-k, N = T * K rows sorted by expert.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.ops.permute import combine, permute, sort_by_expert


class Dispatcher(Protocol):
    """Brings tokens to experts and results back.

    Returns the routed output ``[T, D]`` and the value of ``overlap()``, which the dispatcher may run while tokens travel.
    With ``drops``, an index equal to the number of experts marks a dropped choice, whose weight is 0.
    """

    def __call__(
        self,
        x: torch.Tensor,  # [T, D]
        weights: torch.Tensor,  # [T, K]
        indices: torch.Tensor,  # [T, K]
        experts: Experts,
        overlap: Callable[[], torch.Tensor | None],
        drops: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class LocalDispatcher:
    """All experts are on this device: sort the rows, run the experts, restore the order. Other dispatchers must equal it."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        experts: Experts,
        overlap: Callable[[], torch.Tensor | None],
        drops: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        order = sort_by_expert(indices, self.num_experts + drops)
        rows = permute(x, order)
        if drops:  # dropped choices are sorted to the end and stay zero
            kept = rows.shape[0] - int(order.counts[-1])
            outputs = experts(rows[:kept], order.counts[:-1])
            outputs = F.pad(outputs, (0, 0, 0, rows.shape[0] - kept))
        else:
            outputs = experts(rows, order.counts)
        return combine(outputs, weights, order), overlap()
