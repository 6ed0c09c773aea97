"""The two grouped GEMMs of experts with what comes before them, which backward computes again instead of keeping it.

Shapes: T token states, N rows sorted by expert, M = N / T rows of a state, E experts, D hidden, F expert hidden.
"""

import torch

from parallel.gemm import wanted
from qwen_moe.models.ops.grouped_matmul import Kernel, grouped_mm, kernel_for
from qwen_moe.models.ops.permute import Rows, permute, sum_of_rows
from qwen_moe.models.ops.swiglu import weighted_gradients, weighted_swiglu, weighted_values


class _UpProduct(torch.autograd.Function):
    """y = (x[token])_e W_e^T. Keeps x [T, D], unless its rows are as few. backward gathers them again."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        token: torch.Tensor,
        row: torch.Tensor,
        counts: torch.Tensor,
        kernel: Kernel,
    ) -> torch.Tensor:
        rows = x.index_select(0, token)
        ctx.gathers = len(x) < len(rows)
        ctx.save_for_backward(x if ctx.gathers else rows, weight, token, row, counts)
        ctx.kernel = kernel
        return kernel.product(kernel.operand(rows), weight, counts)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, token, row, counts = ctx.saved_tensors
        kernel, dx, dweight = ctx.kernel, None, None
        dy, need = kernel.operand(grad_outputs[0]), wanted(ctx)
        if need[0]:
            dx = sum_of_rows(kernel.input_gradient(dy, weight, counts), row)
        if need[1]:
            rows = x.index_select(0, token) if ctx.gathers else x
            dweight = kernel.weight_gradient(dy, kernel.operand(rows), weight, counts)
        return dx, dweight, None, None, None, None


class _DownProduct(torch.autograd.Function):
    """y = (weights * swiglu(gate_up))_e W_e^T. Keeps gate_up and weights."""

    @staticmethod
    def forward(
        ctx, gate_up: torch.Tensor, weights: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, kernel: Kernel
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights, weight, counts)
        ctx.kernel = kernel
        g, u = gate_up.chunk(2, dim=-1)
        hidden = weighted_values(g, u, weights)
        return kernel.product(kernel.operand(hidden), weight, counts)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, weights, weight, counts = ctx.saved_tensors
        kernel, dgate_up, dweights, dweight = ctx.kernel, None, None, None
        dy, need = kernel.operand(grad_outputs[0]), wanted(ctx)
        g, u = gate_up.chunk(2, dim=-1)
        if need[0] or need[1]:
            dhidden = kernel.input_gradient(dy, weight, counts)
            dgate_up, dweights, hidden = weighted_gradients(g, u, weights, dhidden)
        else:
            hidden = weighted_values(g, u, weights)
        if need[2]:
            dweight = kernel.weight_gradient(dy, kernel.operand(hidden), weight, counts)
        return dgate_up, dweights, dweight, None, None


def up_product(x: torch.Tensor, rows: Rows, weight: torch.Tensor, kernel: Kernel | None = None) -> torch.Tensor:
    """The rows of states ``x [T, D]`` times ``weight [E, O, D]`` of their experts, transposed: ``[N, O]``. ``kernel``: by
    default the fastest."""
    if not torch.is_grad_enabled():
        return grouped_mm(permute(x, rows), weight, rows.counts)
    return _UpProduct.apply(x, weight, rows.token, rows.row, rows.counts, kernel or kernel_for(x, weight))


def down_product(
    gate_up: torch.Tensor,
    weights: torch.Tensor,
    weight: torch.Tensor,
    counts: torch.Tensor,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """SwiGLU of ``gate_up [N, 2 F]``, times each row's ``weights [N]``, times ``weight [E, D, F]`` of its expert,
    transposed: ``[N, D]``."""
    if not torch.is_grad_enabled():
        return grouped_mm(weighted_swiglu(gate_up, weights), weight, counts)
    return _DownProduct.apply(gate_up, weights, weight, counts, kernel or kernel_for(gate_up, weight))
