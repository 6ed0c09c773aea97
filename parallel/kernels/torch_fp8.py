"""FP8 products through torch, on any device: the four recipes, their state, and linear layers made of them.

A product y = x w^T has three contractions: y over A, dx = dy w over O, dw = dy^T x over tokens. Each operand is rounded to
FP8 with factors that are constant along the contraction, or along blocks of it:

delayed    one factor for a tensor, from earlier steps (TE DelayedScaling; `parallel.kernels.scaling`)
current    one factor for a tensor, from its own largest value (TE Float8CurrentScaling)
blockwise  1 x 128 tiles of x and dy, 128 x 128 blocks of w (TE Float8BlockScaling; arXiv 2412.19437, section 3.3.2)
mxfp8      1 x 32 blocks with E8M0 factors (OCP MX 1.0; TE MXFP8BlockScaling)

In the last two a tensor and its transpose are rounded separately, both from the original. In all but delayed, factors
are of the part of a tensor that a rank multiplies (for a stack of experts: of each expert's rows or weight).
Shapes: N rows (tokens, or choices sorted by expert), A/O input/output features, E experts of this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn

from parallel.collectives import (
    join_sequence,
    reduce_scatter_sequence,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from parallel.kernels.formats import E4M3, E5M2, Quantised, quantise_blocks, quantise_by, scale_of
from parallel.kernels.interface import ExpertPart, GroupedMM, Kernels, Project, swap
from parallel.kernels.padding import Padding
from parallel.kernels.products import expert, grouped_mm, mm, sizes_of, transposed
from parallel.kernels.scaling import DelayedScaling
from parallel.mesh import Axis

BLOCK = {"blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``hybrid``: gradients in E5M2, else all in E4M3. The last three are of ``delayed``."""

    name: Literal["delayed", "current", "blockwise", "mxfp8"]
    hybrid: bool
    history_length: int = 1024
    most_recent: bool = False
    margin: int = 0

    @property
    def row_alignment(self) -> int:
        """Rows of one expert that share factors in the contraction over tokens: no two experts may."""
        return BLOCK.get(self.name, 1)


class Operand:
    """Rows ``x [N, C]`` rounded for contractions over their features C and over the N rows, each when it is needed."""

    def __init__(self, over_features: Callable[[], Quantised], over_rows: Callable[[], Quantised]) -> None:
        self._features, self._rows = over_features, over_rows

    @cached_property
    def over_features(self) -> Quantised:
        return self._features()

    @cached_property
    def over_rows(self) -> Quantised:
        return self._rows()


class TorchFp8(Kernels):
    """``keep_weights``: FP8 weights are kept from a step's first micro-batch to its last. Not where parameters are
    gathered for each use to save memory (ZeRO-3): rounding again gives the same bits, and keeping them would hold what
    was to be let go of."""

    def __init__(self, tp: Axis, stage: Axis, recipe: Recipe, *, keep_weights: bool) -> None:
        super().__init__(tp)
        self.recipe, self.keep_weights = recipe, keep_weights
        self.gradient = E5M2 if recipe.hybrid else E4M3
        self.scaling: DelayedScaling | None = None
        if recipe.name == "delayed":
            self.scaling = DelayedScaling(stage, recipe.history_length, recipe.most_recent, recipe.margin)
        self._in_step = False
        self._kept: dict[tuple[str, bool], Quantised] = {}

    def column(self, path: str, parent: nn.Module, names: Sequence[str]) -> Project | None:
        self._add(f"{path}.input", E4M3)
        for name in names:
            self._add(f"{path}.{name}.weight", E4M3)
            self._add(f"{path}.{name}.grad_output", self.gradient)
        return partial(_project, self, path, tuple(names))

    def row(self, path: str, parent: nn.Module, name: str) -> None:
        for part, fp8 in (("input", E4M3), ("weight", E4M3), ("grad_output", self.gradient)):
            self._add(f"{path}.{name}.{part}", fp8)
        old = getattr(parent, name)
        new = Fp8RowLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.kernels, new.path, new.axis = self, f"{path}.{name}", self.tp
        swap(parent, name, new)

    def grouped(self, path: str, part: ExpertPart) -> GroupedMM | None:
        for name, fp8 in (("input", E4M3), ("weight", E4M3), ("grad_output", self.gradient)):
            self._add(f"{path}.{name}", fp8, part.total)
        return partial(_grouped, self, path, part)

    def _add(self, name: str, fp8: torch.dtype, count: int = 1) -> None:
        if self.scaling is not None:
            self.scaling.add(name, fp8, count)

    def materialise(self, device: torch.device) -> None:
        if self.scaling is not None:
            self.scaling.materialise(device)

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

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.scaling is None else self.scaling.state()

    def _scale(self, name: str, amax: torch.Tensor, fp8: torch.dtype, first: int = 0) -> torch.Tensor:
        """The scale of a tensor (``amax []``) or of each of its experts (``[E]``), in amax's shape."""
        if self.scaling is None:
            return scale_of(amax, fp8, power_of_two=False)
        self.scaling.note(name, amax, first)
        return self.scaling.scales(name, first, amax.numel()).view_as(amax)

    def matrix(self, name: str, x: torch.Tensor, fp8: torch.dtype) -> Operand:
        """``x [N, C]`` of one linear's product."""
        block, e8m0 = BLOCK.get(self.recipe.name), self.recipe.name == "mxfp8"
        if block is not None:
            return Operand(
                lambda: quantise_blocks(x, fp8, (1, block), e8m0), lambda: quantise_blocks(x, fp8, (block, 1), e8m0)
            )
        amax = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        one = quantise_by(x, fp8, self._scale(name, amax, fp8))
        return Operand(lambda: one, lambda: one)

    def rows(self, name: str, x: torch.Tensor, fp8: torch.dtype, part: ExpertPart, padding: Padding) -> Operand:
        """``x [N, C]`` sorted by expert; over each expert's rows, these padded to whole blocks."""
        block, e8m0 = BLOCK.get(self.recipe.name), self.recipe.name == "mxfp8"
        if block is not None:
            return Operand(
                lambda: quantise_blocks(x, fp8, (1, block), e8m0),
                lambda: quantise_blocks(padding.add(x), fp8, (block, 1), e8m0),
            )
        sizes = torch.tensor(padding.sizes, device=x.device)
        of_row = torch.repeat_interleave(torch.arange(part.count, device=x.device), sizes, output_size=x.shape[0])
        amax = torch.zeros(part.count, device=x.device)
        amax.scatter_reduce_(0, of_row, x.abs().amax(1).float(), "amax")
        scale = self._scale(name, amax, fp8, part.first)
        one = Quantised(quantise_by(x, fp8, scale[of_row].unsqueeze(1)).data, scale.reciprocal())
        return Operand(lambda: one, lambda: one)

    def weight(self, name: str, weight: torch.Tensor, over_rows: bool, first: int = 0) -> Quantised:
        """``[O, A]`` or ``[E, O, A]`` for contractions over A, or ``over_rows``, O. Kept within a step."""
        separate = over_rows and self.recipe.name == "mxfp8"
        kept = self._kept.get((name, separate))
        if kept is not None:
            return kept
        weight = weight.detach()
        if self.recipe.name == "mxfp8":
            found = quantise_blocks(weight, E4M3, (32, 1) if over_rows else (1, 32), e8m0=True)
        elif self.recipe.name == "blockwise":
            found = quantise_blocks(weight, E4M3, (128, 128), e8m0=False)
        else:
            amax = weight.abs().amax((-2, -1)).float()
            found = quantise_by(weight, E4M3, self._scale(name, amax, E4M3, first)[..., None, None])
        if self._in_step and self.keep_weights:
            self._kept[name, separate] = found
        return found


class _Linears(torch.autograd.Function):
    """y_i = x W_i^T + b_i for several W_i, of x gathered over ``axis`` (size 1: x itself), with FP8 operands.

    backward: dx = reduce-scatter(sum_i dy_i W_i), dW_i = dy_i^T x. Saved is x in FP8, rounded for dW's contraction; where
    the sequence is split, this rank's part of it as it is, which is gathered and rounded again.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        kernels: TorchFp8,
        path: str,
        names: Sequence[str],
        axis: Axis,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        weights = [weight for weight in parameters[::2] if weight is not None]
        ctx.kernels, ctx.path, ctx.names, ctx.axis = kernels, path, names, axis
        full = join_sequence(start_gather_sequence(x, axis).wait()) if axis.size > 1 else x
        operand = kernels.matrix(f"{path}.input", full.flatten(0, -2), E4M3)
        outputs = []
        for name, weight, bias in zip(names, weights, parameters[1::2], strict=True):
            y = mm(operand.over_features, kernels.weight(f"{path}{name}.weight", weight, False), x.dtype)
            outputs.append((y if bias is None else y + bias).view(*full.shape[:-1], -1))
        ctx.weights, saved = len(weights), []
        if any(ctx.needs_input_grad[5::2]):
            if axis.size == 1:
                saved, ctx.block = [operand.over_rows.data, operand.over_rows.inverse], operand.over_rows.block
            else:
                saved = [x]
        ctx.save_for_backward(*weights, *saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        kernels, axis = ctx.kernels, ctx.axis
        tensors = ctx.saved_tensors  # once: recomputation allows no second look
        weights, saved = tensors[: ctx.weights], tensors[ctx.weights :]
        need = ctx.needs_input_grad
        need_weights, need_biases = need[5::2], need[6::2]
        gather = start_gather_sequence(saved[0], axis) if axis.size > 1 and any(need_weights) else None
        gradients, dx = [], None
        for name, weight, dy in zip(ctx.names, weights, grad_outputs, strict=True):
            slot = f"{ctx.path}{name}"
            gradient = kernels.matrix(f"{slot}.grad_output", dy.flatten(0, -2), kernels.gradient)
            gradients.append(gradient)
            if need[0]:
                part = mm(gradient.over_features, transposed(kernels.weight(f"{slot}.weight", weight, True)), dy.dtype)
                dx = part if dx is None else dx.add_(part)
        scatter = None
        if gather is not None:
            x = join_sequence(gather.wait()).flatten(0, 1)
            over_tokens = kernels.matrix(f"{ctx.path}.input", x, E4M3).over_rows
        elif saved:
            over_tokens = Quantised(saved[0], saved[1], ctx.block)
        if dx is not None:
            dx = dx.view(*grad_outputs[0].shape[:-1], -1)
            scatter = start_reduce_scatter_sequence(dx, axis) if axis.size > 1 else None
        found: list[torch.Tensor | None] = []
        for gradient, dy, need_weight, need_bias in zip(
            gradients, grad_outputs, need_weights, need_biases, strict=True
        ):
            found.append(mm(transposed(gradient.over_rows), transposed(over_tokens), dy.dtype) if need_weight else None)
            found.append(dy.flatten(0, -2).sum(0) if need_bias else None)
        return (scatter.wait() if scatter is not None else dx, None, None, None, None, *found)


def _project(
    kernels: TorchFp8, path: str, names: Sequence[str], x: torch.Tensor, *linears: nn.Linear
) -> tuple[torch.Tensor, ...]:
    parameters: list[torch.Tensor | None] = []
    for linear in linears:
        parameters += [linear.weight, linear.bias]
    return _Linears.apply(x, kernels, path, [f".{name}" for name in names], kernels.tp, *parameters)


_HERE = Axis("here", 1, 0, None)


class Fp8RowLinear(nn.Linear):
    """``[B, S, A / n] -> [B, S / n, O]`` with FP8 operands; partial sums are reduce-scattered in the activations' dtype."""

    kernels: TorchFp8
    path: str
    axis: Axis

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        (y,) = _Linears.apply(input, self.kernels, self.path, [""], _HERE, self.weight, None)
        if self.axis.size > 1:
            y = reduce_scatter_sequence(y, self.axis)
        return y if self.bias is None else y + self.bias


class _Grouped(torch.autograd.Function):
    """y = x_e W_e^T for the rows of each expert e, with FP8 operands. backward: dx_e = dy_e W_e, dW_e = dy_e^T x_e."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        kernels: TorchFp8,
        path: str,
        part: ExpertPart,
        padding: Padding,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        operand = kernels.rows(f"{path}.input", x, E4M3, part, padding)
        ctx.kernels, ctx.path, ctx.part, ctx.padding = kernels, path, part, padding
        saved = []
        if ctx.needs_input_grad[1]:
            saved, ctx.block = [operand.over_rows.data, operand.over_rows.inverse], operand.over_rows.block
        ctx.save_for_backward(weight, counts, *saved)
        quantised = kernels.weight(f"{path}.weight", weight, False, part.first)
        return _by_expert(operand.over_features, quantised, padding.sizes, counts, x.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        weight, counts, *saved = ctx.saved_tensors
        kernels, path, part, padding = ctx.kernels, ctx.path, ctx.part, ctx.padding
        dy = grad_outputs[0]
        gradient = kernels.rows(f"{path}.grad_output", dy, kernels.gradient, part, padding)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            across = transposed(kernels.weight(f"{path}.weight", weight, True, part.first))
            dx = _by_expert(gradient.over_features, across, padding.sizes, counts, dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = _outer_by_expert(gradient.over_rows, Quantised(saved[0], saved[1], ctx.block), padding, dy.dtype)
        return dx, dw, None, None, None, None, None


def _by_expert(
    x: Quantised, weight: Quantised, sizes: Sequence[int], counts: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``x [N, K]`` by ``weight [E, O, K]``: ``[N, O]``."""
    if x.exact_in_bf16:
        return grouped_mm(x.values(dtype), weight.values(dtype), sizes, counts)
    parts = x.data.split(list(sizes))
    return torch.cat([mm(Quantised(p, x.inverse[e]), expert(weight, e), dtype) for e, p in enumerate(parts)])


def _outer_by_expert(dy: Quantised, x: Quantised, padding: Padding, dtype: torch.dtype) -> torch.Tensor:
    """``dy [N, O]``, ``x [N, A]`` (padded rows where in blocks) -> ``[E, O, A]``."""
    if dy.exact_in_bf16:
        left, right = dy.values(dtype), x.values(dtype)
        pairs = zip(left.split(padding.padded), right.split(padding.padded), strict=True)
        return torch.stack([a.T @ b for a, b in pairs])
    parts = zip(dy.data.split(padding.sizes), x.data.split(padding.sizes), strict=True)
    return torch.stack(
        [
            mm(transposed(Quantised(a, dy.inverse[e])), transposed(Quantised(b, x.inverse[e])), dtype)
            for e, (a, b) in enumerate(parts)
        ]
    )


def _grouped(
    kernels: TorchFp8, path: str, part: ExpertPart, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    padding = Padding(sizes_of(counts, x.shape[0]), kernels.recipe.row_alignment, x.device)
    return _Grouped.apply(x, weight, kernels, path, part, padding, counts)
