"""Products of rows sorted by expert with each expert's own weight.

Shapes: N rows, E experts, O/A output/input features; rows of expert e follow those of e - 1.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from parallel.gemm import linear, widen, widens

GroupedMM = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def loop_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``x [N, A]`` times ``weight [E, O, A]`` transposed, rows split by ``counts [E]``: the plain loop, any dtype."""
    parts = x.split(counts.tolist())
    return torch.cat([linear(part, weight[expert]) for expert, part in enumerate(parts)])


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The same as `loop_mm` by the fastest way that there is for the dtype and device. `F.grouped_mm` has none for float64,
    for no rows at all, and for rows that are not a multiple of 16 bytes long: these take the loop."""
    if type(x) is not torch.Tensor:
        # Shapes alone (FakeTensor), where there are no counts to loop over and torch knows the grouped product of bf16 only:
        # one expert's product has the shapes of all.
        return linear(x, weight[0])
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype == torch.float64 or not aligned or not x.shape[0]:
        return loop_mm(x, weight, counts)
    if widens(x):
        return _WidenedLoop.apply(x, weight, counts)
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and type(x) is torch.Tensor:
        return _RoundedLoop.apply(x, weight, counts)
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))


class _RoundedLoop(torch.autograd.Function):
    """`loop_mm` with products of few different sizes. forward: y = x W^T. backward: dx = dy W, dW = dy^T x.

    On a CPU, half-precision products are compiled by oneDNN for each size and kept; routing makes new sizes at every
    step, and compiling them costs as much as multiplying. So a product takes the rows that follow an expert's, up to a
    rounded number: in y and dx the next expert's product then overwrites what is too much, in dW those rows are zero.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts.tolist()
        return _rows_times(x, weight.transpose(-2, -1), ctx.counts)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy = grad_outputs[0]
        dx = _rows_times(dy, weight, ctx.counts) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            for expert, begin, count, rounded in _rounded(ctx.counts):
                if not count:
                    dweight[expert].zero_()
                    continue
                rows = dy[begin : begin + count]
                if rounded > count:
                    rows = F.pad(rows, (0, 0, 0, rounded - count))
                torch.mm(rows.T, _some_rows(x, begin, rounded), out=dweight[expert])
        return dx, dweight, None


class _WidenedLoop(torch.autograd.Function):
    """`loop_mm` for a CPU without instructions for the operands' dtype: one expert's operands are widened at a time."""

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
    """``x [N, A]`` times ``weight [E, A, O]`` by groups of rows."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, begin, count, rounded in _rounded(counts):
        if count and begin + rounded <= x.shape[0]:
            torch.mm(x[begin : begin + rounded], weight[expert], out=out[begin : begin + rounded])
        elif count:
            out[begin : begin + count] = torch.mm(_some_rows(x, begin, rounded), weight[expert])[:count]
    return out


def _some_rows(x: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """``count`` rows of ``x`` from ``begin`` on; zeros where there are no more."""
    rows = x[begin : begin + count]
    return rows if rows.shape[0] == count else F.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _rounded(counts: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(expert, first row, rows, rows rounded up to one of few numbers), in order of rows."""
    begin = 0
    for expert, count in enumerate(counts):
        unit = 16 if count < 512 else 32 if count < 2048 else 64
        yield expert, begin, count, -(-count // unit) * unit
        begin += count
