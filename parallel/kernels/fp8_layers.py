"""Linear layers with FP8 operands: several layers of one input, row-parallel layers, and experts' grouped layers.

Shapes: B batch, S sequence, ``n`` the size of an axis, N rows, A/O input/output features, E experts of this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from parallel.collectives import (
    join_sequence,
    reduce_scatter_sequence,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from parallel.gemm import wanted, widens
from parallel.kernels.formats import E4M3, Quantized
from parallel.kernels.interface import ExpertPart, GroupedMM
from parallel.kernels.matmul import expert, mm, sizes_of, transposed
from parallel.kernels.padding import Padding
from parallel.kernels.quantizer import Quantizer
from parallel.mesh import Axis


class _Linears(torch.autograd.Function):
    """y_i = x W_i^T + b_i for several W_i with FP8 operands. x is gathered over ``axis`` if its size is above 1.

    backward: dx = reduce-scatter(sum_i dy_i W_i), dW_i = dy_i^T x. If the sequence is not split, x is saved in FP8,
    quantized for dW's contraction. Otherwise this rank's part of x is saved, and gathered and quantized again in backward.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        quantizer: Quantizer,
        path: str,
        names: Sequence[str],
        axis: Axis,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        weights = [weight for weight in parameters[::2] if weight is not None]
        ctx.quantizer, ctx.path, ctx.names, ctx.axis = quantizer, path, names, axis
        full = join_sequence(start_gather_sequence(x, axis).wait()) if axis.size > 1 else x
        operand = quantizer.matrix(f"{path}.input", full.flatten(0, -2), E4M3)
        outputs = []
        for name, weight, bias in zip(names, weights, parameters[1::2], strict=True):
            y = mm(operand.over_features, quantizer.weight(f"{path}{name}.weight", weight, False), x.dtype)
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
        quantizer, axis = ctx.quantizer, ctx.axis
        tensors = ctx.saved_tensors  # read once: recomputation forbids a second unpacking
        weights, saved = tensors[: ctx.weights], tensors[ctx.weights :]
        need = wanted(ctx)
        need_weights, need_biases = need[5::2], need[6::2]
        gather = start_gather_sequence(saved[0], axis) if axis.size > 1 and any(need_weights) else None
        gradients, dx = [], None
        for name, weight, dy in zip(ctx.names, weights, grad_outputs, strict=True):
            slot = f"{ctx.path}{name}"
            gradient = quantizer.matrix(f"{slot}.grad_output", dy.flatten(0, -2), quantizer.gradient)
            gradients.append(gradient)
            if need[0]:
                part = mm(
                    gradient.over_features, transposed(quantizer.weight(f"{slot}.weight", weight, True)), dy.dtype
                )
                dx = part if dx is None else dx.add_(part)
        scatter = None
        if gather is not None:
            x = join_sequence(gather.wait()).flatten(0, 1)
            over_tokens = quantizer.matrix(f"{ctx.path}.input", x, E4M3).over_rows
        elif any(need_weights):
            over_tokens = Quantized(saved[0], saved[1], ctx.block)
        if dx is not None:
            dx = dx.view(*grad_outputs[0].shape[:-1], -1)
            scatter = start_reduce_scatter_sequence(dx, axis) if axis.size > 1 else None
        parameter_gradients: list[torch.Tensor | None] = []
        for gradient, dy, need_weight, need_bias in zip(
            gradients, grad_outputs, need_weights, need_biases, strict=True
        ):
            parameter_gradients.append(
                mm(transposed(gradient.over_rows), transposed(over_tokens), dy.dtype) if need_weight else None
            )
            parameter_gradients.append(dy.flatten(0, -2).sum(0) if need_bias else None)
        return (scatter.wait() if scatter is not None else dx, None, None, None, None, *parameter_gradients)


def linears(
    quantizer: Quantizer, path: str, names: Sequence[str], axis: Axis, x: torch.Tensor, *modules: nn.Linear
) -> tuple[torch.Tensor, ...]:
    """``x [B, S / n, A]`` -> ``[B, S, O_i / n]`` for each of ``modules``, whose tensors are named ``path + name``."""
    parameters: list[torch.Tensor | None] = []
    for module in modules:
        parameters += [module.weight, module.bias]
    return _Linears.apply(x, quantizer, path, names, axis, *parameters)


_HERE = Axis("here", 1, 0, None)


class Fp8RowLinear(nn.Linear):
    """``[B, S, A / n] -> [B, S / n, O]`` with FP8 operands. Partial sums are reduce-scattered in the activations' dtype."""

    quantizer: Quantizer
    path: str
    axis: Axis

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        (y,) = _Linears.apply(input, self.quantizer, self.path, [""], _HERE, self.weight, None)
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
        quantizer: Quantizer,
        grouped_mm: GroupedMM,
        path: str,
        part: ExpertPart,
        padding: Padding,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        operand = quantizer.rows(f"{path}.input", x, E4M3, part, padding)
        ctx.quantizer, ctx.path, ctx.part, ctx.padding, ctx.grouped_mm = quantizer, path, part, padding, grouped_mm
        saved = []
        if ctx.needs_input_grad[1]:
            saved, ctx.block = [operand.over_rows.data, operand.over_rows.inverse], operand.over_rows.block
        ctx.save_for_backward(weight, counts, *saved)
        quantized = quantizer.weight(f"{path}.weight", weight, False, part.first)
        return _by_expert(grouped_mm, operand.over_features, quantized, padding.sizes, counts, x.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        weight, counts, *saved = ctx.saved_tensors
        quantizer, path, part, padding = ctx.quantizer, ctx.path, ctx.part, ctx.padding
        dy = grad_outputs[0]
        gradient = quantizer.rows(f"{path}.grad_output", dy, quantizer.gradient, part, padding)
        dx = dw = None
        need = wanted(ctx)
        if need[0]:
            across = transposed(quantizer.weight(f"{path}.weight", weight, True, part.first))
            dx = _by_expert(ctx.grouped_mm, gradient.over_features, across, padding.sizes, counts, dy.dtype)
        if need[1]:
            dw = _outer_by_expert(gradient.over_rows, Quantized(saved[0], saved[1], ctx.block), padding, dy.dtype)
        return dx, dw, None, None, None, None, None, None


def _by_expert(
    grouped_mm: GroupedMM,
    x: Quantized,
    weight: Quantized,
    sizes: Sequence[int],
    counts: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x [N, K]`` times ``weight [E, O, K]`` transposed, expert by expert: ``[N, O]``."""
    if x.exact_in_bf16:
        return grouped_mm(x.values(dtype), weight.values(dtype), counts)
    parts = x.data.split(list(sizes))
    return torch.cat([mm(Quantized(p, x.inverse[e]), expert(weight, e), dtype) for e, p in enumerate(parts)])


def _outer_by_expert(dy: Quantized, x: Quantized, padding: Padding, dtype: torch.dtype) -> torch.Tensor:
    """dW_e = dy_e^T x_e: ``dy [N, O]``, ``x [N, A]`` -> ``[E, O, A]``. Block formats come with padded rows."""
    if dy.exact_in_bf16:
        wide = torch.float32 if widens(dy.data, dtype) else dtype
        left, right = dy.values(wide), x.values(wide)
        pairs = zip(left.split(padding.padded), right.split(padding.padded), strict=True)
        return torch.stack([(a.T @ b).to(dtype) for a, b in pairs])
    parts = zip(dy.data.split(padding.sizes), x.data.split(padding.sizes), strict=True)
    return torch.stack(
        [
            mm(transposed(Quantized(a, dy.inverse[e])), transposed(Quantized(b, x.inverse[e])), dtype)
            for e, (a, b) in enumerate(parts)
        ]
    )


def grouped(
    quantizer: Quantizer,
    grouped_mm: GroupedMM,
    path: str,
    part: ExpertPart,
    x: torch.Tensor,
    weight: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    padding = Padding(sizes_of(counts, x.shape[0]), quantizer.recipe.row_alignment, x.device)
    return _Grouped.apply(x, weight, quantizer, grouped_mm, path, part, padding, counts)
