"""Linear layers: a single layer, and several projections of one input. Shapes: A/O input/output features."""

from collections.abc import Callable

import torch
from torch import nn

from parallel.gemm import linear, linears

Project = Callable[..., tuple[torch.Tensor, ...]]


def project(x: torch.Tensor, *linear_layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """Apply each of ``linear_layers`` to ``x``. Tensor parallelism replaces it by a version with a single gather."""
    return linears(x, *(tensor for layer in linear_layers for tensor in (layer.weight, layer.bias)))


class Linear(nn.Linear):
    """`torch.nn.Linear` with fast half-precision GEMMs on every CPU (`parallel.gemm`)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)
