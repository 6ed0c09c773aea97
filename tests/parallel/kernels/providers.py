"""The provider under test, its layers in one process, and their plain counterparts in float64."""

from typing import Any

import torch
from torch import nn

from parallel.kernels.interface import ExpertPart
from parallel.kernels.quantizer import Recipe
from parallel.kernels.torch_fp8 import TorchFp8
from parallel.mesh import Axis
from qwen_moe.models.ops.grouped_matmul import grouped_mm

ONE = Axis("one", 1, 0, None)
RECIPES = ("delayed", "current", "blockwise", "mxfp8")
HYBRID = {"delayed": True, "current": True, "blockwise": False, "mxfp8": False}


def provider(recipe: str, *, keep_weights: bool = True, tp: Axis = ONE, **settings: Any) -> TorchFp8:
    settings = {"hybrid": HYBRID[recipe]} | settings
    return TorchFp8(tp, tp, Recipe(name=recipe, **settings), keep_weights=keep_weights, grouped_mm=grouped_mm)  # type: ignore[arg-type]


def linear_through(kernels: TorchFp8, x: torch.Tensor, linear: nn.Linear, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx and dw of one column projection with output gradient ``dy``; two rounds for delayed, whose first has no
    history yet."""
    parent = nn.Module()
    parent.up = linear
    project = kernels.column("block", parent, ["up"])
    kernels.materialize(torch.device("cpu"))
    assert project is not None
    for _ in range(2 if kernels.quantizer.scaling is not None else 1):
        kernels.begin_step()
        leaf = x.detach().requires_grad_()
        (y,) = project(leaf, linear)
        dx, dw = torch.autograd.grad(y, [leaf, linear.weight], dy)
        kernels.end_step()
    return {"y": y.detach(), "dx": dx, "dw": dw}


def experts_through(
    kernels: TorchFp8, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, dy: torch.Tensor
) -> dict[str, torch.Tensor]:
    count = counts.numel()
    matmul = kernels.grouped("experts", ExpertPart(total=count, first=0, count=count))
    kernels.materialize(torch.device("cpu"))
    assert matmul is not None
    for _ in range(2 if kernels.quantizer.scaling is not None else 1):
        kernels.begin_step()
        leaf, held = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = matmul(leaf, held, counts)
        dx, dw = torch.autograd.grad(y, [leaf, held], dy)
        kernels.end_step()
    return {"y": y.detach(), "dx": dx, "dw": dw}
