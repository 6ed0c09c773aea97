"""Half-precision GEMMs on CPUs without half-precision instructions.

On such a CPU torch multiplies bfloat16 and float16 matrices with plain loops, about a hundred times slower than float32
(pytorch #146508). Here the operands are widened to float32 and the result is rounded to the operands' dtype: the
operands and the rounding of the result are the same, and sums are in float32. Where the instructions exist, and on every
other device, `widen` returns its argument and nothing changes.

Generation multiplies few rows by a weight, without gradients. In half precision, the operands then change places (`times`).
`wanted` says which of its gradients a backward has to multiply for.
"""

import functools
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Values of oneDNN's ONEDNN_MAX_CPU_ISA under which it emulates bfloat16 with AVX-512 conversions.
_EMULATED = ("AVX512_CORE", "AVX512_CORE_VNNI")
HALF = (torch.bfloat16, torch.float16)
# Rows up to which a half-precision product is faster the other way around: 1.3 to 1.7 times on a CPU with AMX.
_FEW = 64


@functools.cache
def has_hardware(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply matrices of ``dtype``.

    Read once per process from the processor's features and from oneDNN's limit (`ONEDNN_MAX_CPU_ISA`). It is not measured:
    two processes of a run, or a run and its resumption, must not choose differently because one of them was disturbed.
    """
    if dtype not in HALF:
        return True
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return _limit() not in _EMULATED and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 matrices with AMX tiles. Read as `has_hardware` is."""
    limit = _limit()
    return (
        has_hardware(torch.bfloat16)
        and torch.cpu._is_amx_tile_supported()
        and (limit in ("", "ALL", "DEFAULT") or "AMX" in limit)
    )


def _limit() -> str:
    """What the user keeps oneDNN to: a value of ONEDNN_MAX_CPU_ISA, or nothing."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


def widens(x: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether matmuls of ``x``, in ``dtype`` (default: its own), are computed in float32. Always False for subclasses,
    because fake tensors stand for any device."""
    return x.device.type == "cpu" and type(x) in (torch.Tensor, nn.Parameter) and not has_hardware(dtype or x.dtype)


def widen(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matmul operand: unchanged, or in float32 where this CPU has no instructions for its dtype."""
    return x.float() if widens(x) else x


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., A]`` times ``weight [O, A]`` transposed, plus ``bias [O]``, in the weight's dtype: ``[..., O]``.

    ``x`` may be widened already. Do not use it under autograd, which would save the widened operands.
    """
    if x.dtype == weight.dtype and x.numel() == x.shape[-1]:
        return F.linear(x, weight, bias)  # one row: torch's matrix-vector kernel sums in float32 on every CPU
    return F.linear(widen(x), widen(weight), None if bias is None else widen(bias)).to(weight.dtype)


def mm_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out [M, N] = a [M, K] @ b [K, N]``. Operands that are widened already are rounded to ``out``'s dtype."""
    if a.dtype == b.dtype == out.dtype and not widens(a):
        torch.mm(a, b, out=out)
    else:
        out.copy_(widen(a) @ widen(b))


def summed_products(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of ``a_i [M, K_i] @ b_i [K_i, N]``, added up inside the GEMMs. ``a`` is widened already, ``b`` is not."""
    total = a[0] @ widen(b[0])
    for left, right in zip(a[1:], b[1:], strict=True):
        total.addmm_(left, widen(right))
    return total


def exact_bmm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a [N, M, K] @ b [N, K, L]`` in float32, of float32 tensors whose values are all values of ``dtype``.

    The product of two bfloat16 values is exact in float32. So oneDNN may multiply them with its bfloat16 instructions, which
    add in float32: the result is as accurate, in half the time on a CPU with AMX.
    """
    if dtype != torch.bfloat16 or widens(a, dtype):
        return torch.bmm(a, b)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return torch.bmm(a, b)
    finally:
        matmul.fp32_precision = before


def exact_mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`exact_bmm` of one pair, ``a [M, K] @ b [K, L]``."""
    return exact_bmm(a.unsqueeze(0), b.unsqueeze(0), dtype).squeeze(0)


def wanted(ctx: Any) -> tuple[bool, ...]:
    """For each argument of the autograd function of ``ctx``, whether the backward that runs now uses its gradient.

    `ctx.needs_input_grad` tells only whether it ever needs one. A zero-bubble schedule runs each backward twice, for the
    gradients of activations and then for those of weights: both times it would say that both are needed (pytorch #174017).
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # one for each argument that needs a gradient
    return tuple(needs and _executes(next(nodes)) for needs in ctx.needs_input_grad)


def _executes(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient was asked for by name
        return True


class _Linears(torch.autograd.Function):
    """y_i = x W_i^T + b_i. backward: dx = sum_i dy_i W_i, accumulated inside the GEMMs; dW_i = dy_i^T x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        operand = widen(x) if x.numel() > x.shape[-1] else x
        return tuple(affine(operand, w, b) for w, b in zip(weights, biases, strict=True) if w is not None)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need = wanted(ctx)
        rows = [widen(dy.flatten(0, -2)) for dy in grad_outputs]
        dx = None
        if need[0]:
            dx = summed_products(rows, weights).view_as(x).to(x.dtype)
        operand = widen(x.flatten(0, -2)) if any(need[1::2]) else None
        parameter_gradients: list[torch.Tensor | None] = []
        for dy, need_weight, need_bias in zip(rows, need[1::2], need[2::2], strict=True):
            parameter_gradients.append((dy.T @ operand).to(x.dtype) if need_weight and operand is not None else None)
            parameter_gradients.append(dy.sum(0).to(x.dtype) if need_bias else None)
        return dx, *parameter_gradients


def times(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [N, A]`` times ``weight [O, A]`` transposed, plus ``bias [O]``: ``[N, O]``. Without gradients, for few rows N of
    half precision on a CPU.

    oneDNN rearranges the second operand before it multiplies. For few rows that takes longer than the product, so the second
    operand is the small one here. One row is a matrix-vector product, which rearranges nothing.
    """
    if len(x) == 1:
        row = x[0]
        return (torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)).unsqueeze(0)
    y = torch.mm(weight, x.T) if bias is None else torch.addmm(bias.unsqueeze(1), weight, x.T)
    return y.T.contiguous()


def _few_rows(x: torch.Tensor) -> bool:
    """Whether `times` is faster for products of ``x``."""
    if x.dtype not in HALF or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    few = 0 < x.numel() <= _FEW * x.shape[-1]
    return few and x.device.type == "cpu" and type(x) is torch.Tensor and not widens(x)


def linears(x: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """``x [..., A] -> [..., O_i]`` for each pair ``weight [O_i, A]``, ``bias [O_i]`` (or None) of ``parameters``.

    Differentiable; saves ``x`` and the weights in their own dtypes.
    """
    if _few_rows(x):
        rows, pairs = x.flatten(0, -2), zip(parameters[::2], parameters[1::2], strict=True)
        return tuple(times(rows, w, bias).view(*x.shape[:-1], len(w)) for w, bias in pairs if w is not None)
    return _Linears.apply(x, *parameters)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, widened where the CPU has no instructions for the operands' dtype."""
    if widens(x) or _few_rows(x):
        return linears(x, weight, bias)[0]
    return F.linear(x, weight, bias)


def description(dtype: torch.dtype) -> str:
    """A sentence that says how this CPU computes matmuls of ``dtype``."""
    name = str(dtype).removeprefix("torch.")
    if has_hardware(dtype):
        return f"{name} products by the processor's own instructions"
    return f"{name} products in float32, rounded to {name} (this processor has no {name} instructions)"
