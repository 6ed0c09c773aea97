"""Quantizes the operands of FP8 matmuls: the four FP8 recipes and their state.

A layer y = x w^T has three matmuls: y contracts over A, dx = dy w over O, dw = dy^T x over tokens. Each operand is
quantized to FP8 with factors that are constant along the contraction, or along blocks of it:

delayed    one factor per tensor, from earlier steps (TE DelayedScaling; `parallel.kernels.scaling`)
current    one factor per tensor, from its own amax (TE Float8CurrentScaling)
blockwise  1 x 128 tiles of x and dy, 128 x 128 blocks of w (TE Float8BlockScaling; arXiv 2412.19437, section 3.3.2)
mxfp8      1 x 32 blocks with E8M0 factors (OCP MX 1.0; TE MXFP8BlockScaling)

In the last two, a tensor and its transpose are quantized separately, both from the original. In all but delayed, factors
are per local shard: the part of the tensor that this rank multiplies (for stacked experts, each expert's rows or weight).
Shapes: N rows (tokens, or choices sorted by expert), A/O input/output features, E experts of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from parallel.kernels.formats import E4M3, E5M2, Quantized, quantize_blocks, quantize_by, scale_of
from parallel.kernels.interface import ExpertPart
from parallel.kernels.padding import Padding
from parallel.kernels.scaling import DelayedScaling
from parallel.mesh import Axis

BLOCK = {"blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An FP8 recipe. ``hybrid``: gradients in E5M2, else everything in E4M3. Only ``delayed`` uses the last three fields."""

    name: Literal["delayed", "current", "blockwise", "mxfp8"]
    hybrid: bool
    history_length: int = 1024
    most_recent: bool = False
    margin: int = 0

    @property
    def row_alignment(self) -> int:
        """How many rows share one factor in the contraction over tokens. An expert's rows are padded to this multiple, so
        that no two experts share a factor."""
        return BLOCK.get(self.name, 1)


class Operand:
    """Rows ``x [N, C]``, quantized lazily for contractions over the features C and over the N rows."""

    def __init__(self, over_features: Callable[[], Quantized], over_rows: Callable[[], Quantized]) -> None:
        self._features, self._rows = over_features, over_rows

    @cached_property
    def over_features(self) -> Quantized:
        return self._features()

    @cached_property
    def over_rows(self) -> Quantized:
        return self._rows()


class Quantizer:
    """Quantizes named tensors by ``recipe`` and keeps its state. ``gradient``: the format of output gradients.

    ``keep_weights``: keep FP8 weights from a step's first micro-batch to its last. Leave it off where parameters are
    gathered for each use to save memory (ZeRO-3): quantizing again gives the same bits, and keeping the result would hold
    the memory that resharding frees. ``stage``: the ranks that share amax (see `DelayedScaling`).
    """

    def __init__(self, stage: Axis, recipe: Recipe, *, keep_weights: bool) -> None:
        self.recipe, self.keep_weights = recipe, keep_weights
        self.gradient = E5M2 if recipe.hybrid else E4M3
        self.scaling: DelayedScaling | None = None
        if recipe.name == "delayed":
            self.scaling = DelayedScaling(stage, recipe.history_length, recipe.most_recent, recipe.margin)
        self._in_step = False
        self._kept: dict[tuple[str, bool], Quantized] = {}

    def add(self, name: str, count: int = 1, weights: tuple[str, ...] = ("",)) -> None:
        """Register the input, weights and output gradients of layer ``name`` (with ``count`` experts)."""
        if self.scaling is None:
            return
        self.scaling.add(f"{name}.input", E4M3, count)
        for weight in weights:
            self.scaling.add(f"{name}{weight}.weight", E4M3, count)
            self.scaling.add(f"{name}{weight}.grad_output", self.gradient, count)

    @property
    def kept(self) -> int:
        """The number of weights kept in FP8 now."""
        return len(self._kept)

    def begin_step(self) -> None:
        self._in_step = True
        self._kept.clear()
        if self.scaling is not None:
            self.scaling.begin_step()

    def end_step(self) -> None:
        self._in_step = False
        self._kept.clear()
        if self.scaling is not None:
            self.scaling.end_step()

    def _scale(self, name: str, amax: torch.Tensor, fp8: torch.dtype, first: int = 0) -> torch.Tensor:
        """The scale of a tensor (``amax []``) or of each of its experts (``amax [E]``), in the shape of ``amax``."""
        if self.scaling is None:
            return scale_of(amax, fp8, power_of_two=False)
        self.scaling.note(name, amax, first)
        return self.scaling.scales(name, first, amax.numel()).view_as(amax)

    def matrix(self, name: str, x: torch.Tensor, fp8: torch.dtype) -> Operand:
        """Quantize ``x [N, C]``, an operand of one linear layer."""
        block, e8m0 = BLOCK.get(self.recipe.name), self.recipe.name == "mxfp8"
        if block is not None:
            return Operand(
                lambda: quantize_blocks(x, fp8, (1, block), e8m0), lambda: quantize_blocks(x, fp8, (block, 1), e8m0)
            )
        amax = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        one = quantize_by(x, fp8, self._scale(name, amax, fp8))
        return Operand(lambda: one, lambda: one)

    def rows(self, name: str, x: torch.Tensor, fp8: torch.dtype, part: ExpertPart, padding: Padding) -> Operand:
        """Quantize ``x [N, C]``, sorted by expert. For contractions over rows, each expert's rows are padded to whole
        blocks."""
        block, e8m0 = BLOCK.get(self.recipe.name), self.recipe.name == "mxfp8"
        if block is not None:
            return Operand(
                lambda: quantize_blocks(x, fp8, (1, block), e8m0),
                lambda: quantize_blocks(padding.add(x), fp8, (block, 1), e8m0),
            )
        sizes = torch.tensor(padding.sizes, device=x.device)
        of_row = torch.repeat_interleave(torch.arange(part.count, device=x.device), sizes, output_size=x.shape[0])
        amax = torch.zeros(part.count, device=x.device)
        amax.scatter_reduce_(0, of_row, x.abs().amax(1).float(), "amax")
        scale = self._scale(name, amax, fp8, part.first)
        one = Quantized(quantize_by(x, fp8, scale[of_row].unsqueeze(1)).data, scale.reciprocal())
        return Operand(lambda: one, lambda: one)

    def weight(self, name: str, weight: torch.Tensor, over_rows: bool, first: int = 0) -> Quantized:
        """Quantize ``weight [O, A]`` or ``[E, O, A]`` for contractions over A, or with ``over_rows`` over O. The result is
        kept within a step."""
        separate = over_rows and self.recipe.name == "mxfp8"
        kept = self._kept.get((name, separate))
        if kept is not None:
            return kept
        weight = weight.detach()
        if self.recipe.name == "mxfp8":
            quantized = quantize_blocks(weight, E4M3, (32, 1) if over_rows else (1, 32), e8m0=True)
        elif self.recipe.name == "blockwise":
            quantized = quantize_blocks(weight, E4M3, (128, 128), e8m0=False)
        else:
            amax = weight.abs().amax((-2, -1)).float()
            quantized = quantize_by(weight, E4M3, self._scale(name, amax, E4M3, first)[..., None, None])
        if self._in_step and self.keep_weights:
            self._kept[name, separate] = quantized
        return quantized
