"""Linear layers: the single layer, and several projections of one input. Shapes: A/O input/output features."""

from collections.abc import Callable

import torch
from torch import nn

from parallel.gemm import linear, linears

Project = Callable[..., tuple[torch.Tensor, ...]]


def project(x: torch.Tensor, *linear_layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """Each of ``linear_layers`` applied to ``x``. A plan replaces it where one gather of a split sequence serves all."""
    return linears(x, *(tensor for layer in linear_layers for tensor in (layer.weight, layer.bias)))


class Linear(nn.Linear):
    """`torch.nn.Linear` that multiplies half precision at speed on every CPU (`parallel.gemm`)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)
