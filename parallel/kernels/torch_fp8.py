"""The kernel provider for FP8 matmuls through torch, on any device."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from parallel.kernels.fp8_layers import Fp8RowLinear, grouped, linears
from parallel.kernels.interface import ExpertPart, GroupedMM, Kernels, Project, swap
from parallel.kernels.quantizer import Quantizer, Recipe
from parallel.mesh import Axis


class TorchFp8(Kernels):
    """Runs all projections and experts with FP8 operands by ``recipe``. Norms and attention stay the model's own.
    ``grouped_mm`` (also the model's) multiplies experts' dequantized values where those are exact in bfloat16."""

    def __init__(self, tp: Axis, stage: Axis, recipe: Recipe, *, keep_weights: bool, grouped_mm: GroupedMM) -> None:
        super().__init__(tp)
        self.grouped_mm = grouped_mm
        self.quantizer = Quantizer(stage, recipe, keep_weights=keep_weights)

    def column(self, path: str, parent: nn.Module, names: Sequence[str]) -> Project | None:
        suffixes = tuple(f".{name}" for name in names)
        self.quantizer.add(path, weights=suffixes)
        return partial(linears, self.quantizer, path, suffixes, self.tp)

    def row(self, path: str, parent: nn.Module, name: str) -> None:
        self.quantizer.add(f"{path}.{name}")
        old = getattr(parent, name)
        new = Fp8RowLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.quantizer, new.path, new.axis = self.quantizer, f"{path}.{name}", self.tp
        swap(parent, name, new)

    def grouped(self, path: str, part: ExpertPart) -> GroupedMM | None:
        self.quantizer.add(path, part.total)
        return partial(grouped, self.quantizer, self.grouped_mm, path, part)

    def materialize(self, device: torch.device) -> None:
        if self.quantizer.scaling is not None:
            self.quantizer.scaling.materialize(device)

    def begin_step(self) -> None:
        self.quantizer.begin_step()

    def end_step(self) -> None:
        self.quantizer.end_step()

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.quantizer.scaling is None else self.quantizer.scaling.state()
