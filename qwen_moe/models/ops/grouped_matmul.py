"""Grouped GEMMs: rows sorted by expert times each expert's own weight.

Shapes: N rows, E experts, O/A output/input features; rows of expert e follow those of e - 1.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from parallel.gemm import HALF, affine, times, wanted, widen, widens

FEW = 256  # rows in all, when tokens are generated
GroupedMM = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Kernel:
    """The three products of a grouped GEMM, without autograd. This one loops over experts, for any dtype.

    ``counts [E]`` are the experts' rows. ``x`` and ``dy`` went through `operand`.
    """

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """Rows as the products take them."""
        return x

    def product(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``x_e W_e^T``: ``x [N, A]``, ``weight [E, O, A]`` -> ``[N, O]``."""
        return torch.cat([affine(part, weight[e]) for e, part in enumerate(x.split(counts.tolist()))])

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``dy_e W_e``: ``dy [N, O]``, ``weight [E, O, A]`` -> ``[N, A]``."""
        return torch.cat([affine(part, weight[e].T) for e, part in enumerate(dy.split(counts.tolist()))])

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """``dy_e^T x_e`` in the shape of ``weight``: ``dy [N, O]``, ``x [N, A]`` -> ``[E, O, A]``."""
        sizes = counts.tolist()
        pairs = zip(dy.split(sizes), x.split(sizes), strict=True)
        return torch.stack([(widen(a).T @ widen(b)).to(weight.dtype) for a, b in pairs])


class OneKernel(Kernel):
    """Each product is one kernel of torch, which a GPU runs."""

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()

    def product(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=_ends(counts))

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(dy, weight, offs=_ends(counts))

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        return F.grouped_mm(dy.T, x, offs=_ends(counts))


class _Shapes(Kernel):
    """For fake tensors, which have no counts to loop over: one expert's GEMM has the same shapes. Torch's own fake
    grouped_mm supports bfloat16 only."""

    def product(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return x @ weight[0].T

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return dy @ weight[0]

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.zeros_like(weight)
        gradient[0] = dy.T @ x
        return gradient


class _Rounded(Kernel):
    """GEMMs of few different sizes, for half precision on a CPU.

    oneDNN compiles a half-precision GEMM for each size and caches it. Routing makes new sizes at every step, and compiling
    costs as much as multiplying. So the rows of each expert are rounded up by including the rows that follow them. In
    outputs the next expert's GEMM overwrites the surplus; for dW the surplus rows of dy are zero meanwhile.
    """

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()  # not an expanded scalar, whose rows share their memory

    def product(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _rows_times(x, weight.transpose(-2, -1), counts.tolist())

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _rows_times(dy, weight, counts.tolist())

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(weight)
        for expert, begin, count, rounded in _rounded(counts.tolist()):
            if not count:
                gradient[expert].zero_()
                continue
            surplus = dy[begin + count : begin + rounded]
            kept = surplus.clone()
            surplus.zero_()
            rows = _some_rows(dy, begin, rounded)
            torch.mm(rows.T, _some_rows(x, begin, rounded), out=gradient[expert])
            surplus.copy_(kept)
        return gradient


class _Widened(Kernel):
    """For a CPU without instructions for the operands' dtype. All rows are widened at once, weights one expert at a time."""

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return widen(x)

    def product(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _widened_times(x, weight.transpose(-2, -1), counts)

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _widened_times(dy, weight, counts)

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(weight)
        for expert, rows in enumerate(_rows_of_experts(counts.tolist())):
            if rows.start == rows.stop:
                gradient[expert].zero_()
            else:
                gradient[expert] = dy[rows].T @ x[rows]
        return gradient


LOOP, ONE_KERNEL = Kernel(), OneKernel()
_SHAPES, _ROUNDED, _WIDENED = _Shapes(), _Rounded(), _Widened()


def kernel_for(x: torch.Tensor, weight: torch.Tensor) -> Kernel:
    """The fastest kernel for the dtype and device of ``x [N, A]`` and for ``weight [E, O, A]``. `F.grouped_mm` does not take
    float64, zero rows, or rows whose length is not a multiple of 16 bytes; these use the loop."""
    if type(x) is not torch.Tensor:
        return _SHAPES
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype == torch.float64 or not aligned or not x.shape[0]:
        return LOOP
    if widens(x):
        return _WIDENED
    return _ROUNDED if x.device.type == "cpu" and x.dtype in HALF else ONE_KERNEL


class _GroupedMM(torch.autograd.Function):
    """y = x_e W_e^T. backward: dx = dy_e W_e, dW = dy_e^T x_e."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.kernel = kernel
        return kernel.product(kernel.operand(x), weight, counts)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight, counts = ctx.saved_tensors
        kernel, dx, dweight = ctx.kernel, None, None
        dy, need = kernel.operand(grad_outputs[0]), wanted(ctx)
        if need[0]:
            dx = kernel.input_gradient(dy, weight, counts)
        if need[1]:
            dweight = kernel.weight_gradient(dy, kernel.operand(x), weight, counts)
        return dx, dweight, None, None


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows of each expert, ``x [N, A]`` split by ``counts [E]``, times its ``weight [E, O, A]`` transposed: ``[N, O]``.

    By the fastest kernel for them."""
    kernel = kernel_for(x, weight)
    if torch.is_grad_enabled():
        return _GroupedMM.apply(x, weight, counts, kernel)
    if kernel in (_WIDENED, _ROUNDED, ONE_KERNEL) and x.device.type == "cpu" and x.shape[0] <= FEW:
        return _few_rows_times(x, weight, counts)
    return kernel.product(kernel.operand(x), weight, counts)


def _ends(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0).to(torch.int32)


def _few_rows_times(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`grouped_mm` without gradients that reads only the weights of experts that have rows, unless those are most."""
    out, wide, sizes = x.new_empty(x.shape[0], weight.shape[1]), widens(x), counts.tolist()
    if x.dtype in HALF and not wide and 2 * sum(size > 1 for size in sizes) >= len(sizes):
        return _padded_times(x, weight, counts, max(sizes))
    for expert, rows in enumerate(_rows_of_experts(sizes)):
        if rows.start == rows.stop:
            continue
        if wide and rows.stop - rows.start > 1:
            out[rows] = widen(x[rows]) @ widen(weight[expert]).T
        elif x.dtype in HALF:  # one row: torch's matrix-vector kernel sums in float32 on every CPU
            out[rows] = times(x[rows], weight[expert])
        else:
            torch.mm(x[rows], weight[expert].T, out=out[rows])
    return out


def _padded_times(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, most: int) -> torch.Tensor:
    """`grouped_mm` in one batched product: ``most`` rows of each expert, of which some are padding.

    oneDNN takes some 20 microseconds to begin a half-precision product, and multiplies a few rows in the time of one. As in
    `times`, the second operand, which it rearranges, is the small one.
    """
    experts = torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=len(x))
    place = torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[experts]
    padded = x.new_zeros(len(counts), most, x.shape[1])
    padded[experts, place] = x
    return torch.bmm(weight, padded.transpose(1, 2)).transpose(1, 2)[experts, place]


def _rows_of_experts(counts: list[int]) -> Iterator[slice]:
    """The rows of each expert."""
    begin = 0
    for count in counts:
        yield slice(begin, begin + count)
        begin += count


def _widened_times(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``x [N, A]``, which is widened, times ``weight [E, A, O]``, in the weight's dtype."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, rows in enumerate(_rows_of_experts(counts.tolist())):
        if rows.start != rows.stop:
            torch.mm(x[rows], widen(weight[expert]), out=out[rows])
    return out.to(weight.dtype)


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
    """(expert, first row, rows, rows rounded up to a multiple), in order of rows.

    Each size costs about 0.3 MB and a millisecond on a CPU with AMX. Of 512 rows, 32 more on average cost less.
    """
    begin = 0
    for expert, count in enumerate(counts):
        unit = 32 if count < 256 else 64 if count < 1024 else 128
        yield expert, begin, count, -(-count // unit) * unit
        begin += count
