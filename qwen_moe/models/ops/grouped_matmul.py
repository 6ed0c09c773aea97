"""Grouped GEMMs: rows sorted by expert times each expert's own weight.

Shapes: N rows, E experts, O/A output/input features; rows of expert e follow those of e - 1.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from parallel.gemm import HALF, linear, times, widen, widens

FEW = 256  # rows in all, when tokens are generated
GroupedMM = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def loop_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``x [N, A]`` times ``weight [E, O, A]`` transposed, rows split by ``counts [E]``: a plain loop, for any dtype."""
    parts = x.split(counts.tolist())
    return torch.cat([linear(part, weight[expert]) for expert, part in enumerate(parts)])


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Like `loop_mm`, using the fastest kernel for the dtype and device. `F.grouped_mm` does not take float64, zero rows, or
    rows whose length is not a multiple of 16 bytes; these use the loop."""
    if type(x) is not torch.Tensor:
        # A FakeTensor has no counts to loop over, and torch's fake grouped_mm supports bf16 only. One expert's GEMM has the
        # same shapes.
        return linear(x, weight[0])
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype == torch.float64 or not aligned or not x.shape[0]:
        return loop_mm(x, weight, counts)
    if x.device.type == "cpu" and x.shape[0] <= FEW and not torch.is_grad_enabled():
        return _few_rows_times(x, weight, counts)
    if widens(x):
        return _WidenedLoop.apply(x, weight, counts)
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and type(x) is torch.Tensor:
        return _RoundedLoop.apply(x, weight, counts)
    return one_kernel_mm(x, weight, counts)


def one_kernel_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`loop_mm` in one kernel of torch, which a GPU runs."""
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))


def _few_rows_times(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`loop_mm` without gradients that reads only the weights of experts that have rows, unless those are most."""
    out, wide, sizes = x.new_empty(x.shape[0], weight.shape[1]), widens(x), counts.tolist()
    if x.dtype in HALF and not wide and 2 * sum(size > 1 for size in sizes) >= len(sizes):
        return _padded_times(x, weight, counts, max(sizes))
    for expert, rows in _rows_of_experts(sizes):
        if wide and rows.stop - rows.start > 1:
            out[rows] = widen(x[rows]) @ widen(weight[expert]).T
        elif x.dtype in HALF:  # one row: torch's matrix-vector kernel sums in float32 on every CPU
            out[rows] = times(x[rows], weight[expert])
        else:
            torch.mm(x[rows], weight[expert].T, out=out[rows])
    return out


def _padded_times(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, most: int) -> torch.Tensor:
    """`loop_mm` in one batched product: ``most`` rows of each expert, of which some are padding.

    oneDNN takes some 20 microseconds to begin a half-precision product, and multiplies a few rows in the time of one. As in
    `times`, the second operand, which it rearranges, is the small one.
    """
    experts = torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=len(x))
    place = torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[experts]
    padded = x.new_zeros(len(counts), most, x.shape[1])
    padded[experts, place] = x
    return torch.bmm(weight, padded.transpose(1, 2)).transpose(1, 2)[experts, place]


class _RoundedLoop(torch.autograd.Function):
    """`loop_mm` with GEMMs of few different sizes. forward: y = x W^T. backward: dx = dy W, dW = dy^T x.

    On a CPU, oneDNN compiles a half-precision GEMM for each size and caches it. Routing makes new sizes at every step, and
    compiling costs as much as multiplying. So the rows of each expert are rounded up by including the rows that follow
    them. In y and dx the next expert's GEMM overwrites the surplus; for dW the surplus rows of dy are zero meanwhile.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts.tolist()
        return _rows_times(x, weight.transpose(-2, -1), ctx.counts)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy = grad_outputs[0].contiguous()  # not an expanded scalar, whose rows share their memory
        dx = _rows_times(dy, weight, ctx.counts) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            for expert, begin, count, rounded in _rounded(ctx.counts):
                if not count:
                    dweight[expert].zero_()
                    continue
                surplus = dy[begin + count : begin + rounded]
                kept = surplus.clone()
                surplus.zero_()
                rows = _some_rows(dy, begin, rounded)
                torch.mm(rows.T, _some_rows(x, begin, rounded), out=dweight[expert])
                surplus.copy_(kept)
        return dx, dweight, None


class _WidenedLoop(torch.autograd.Function):
    """`loop_mm` for a CPU without instructions for the operands' dtype. Operands are widened one expert at a time."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts.tolist()
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in _rows_of_experts(ctx.counts):
            out[rows] = widen(x[rows]) @ widen(weight[expert]).T
        return out

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for expert, rows in _rows_of_experts(ctx.counts):
            dy = widen(grad_outputs[0][rows])
            if dx is not None:
                dx[rows] = dy @ widen(weight[expert])
            if dweight is not None:
                dweight[expert] = dy.T @ widen(x[rows])
        return dx, dweight, None


def _rows_of_experts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count


def _rows_times(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """``x [N, A]`` times ``weight [E, A, O]``, expert by expert."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, begin, count, rounded in _rounded(counts):
        if count and begin + rounded <= x.shape[0]:
            torch.mm(x[begin : begin + rounded], weight[expert], out=out[begin : begin + rounded])
        elif count:
            out[begin : begin + count] = torch.mm(_some_rows(x, begin, rounded), weight[expert])[:count]
    return out


def _some_rows(x: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """``count`` rows of ``x`` from ``begin`` on, padded with zeros past the end."""
    rows = x[begin : begin + count]
    return rows if rows.shape[0] == count else F.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _rounded(counts: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(expert, first row, rows, rows rounded up to a multiple), in order of rows."""
    begin = 0
    for expert, count in enumerate(counts):
        unit = 16 if count < 512 else 32 if count < 2048 else 64
        yield expert, begin, count, -(-count // unit) * unit
        begin += count
