"""Collectives over one axis, and autograd functions that pair each forward collective with its backward.

Shapes: B batch, S sequence, D hidden; ``n`` is the size of the axis. Sequence-split tensors are ``[B, S / n, D]``.
"""

import torch
import torch.distributed as dist

from parallel.mesh import Axis

# torch 2.13 renamed these two and deprecates the old names; earlier versions have only the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_sum(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum over ``axis`` as a new tensor. The argument is not changed: reducing a count in place and using it again
    counts twice."""
    total = tensor.clone()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
    return total


def all_reduce_max(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The elementwise maximum over ``axis`` as a new tensor."""
    largest = tensor.clone()
    if axis.size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=axis.group)
    return largest


class Pending:
    """A collective in flight and the buffer it fills; `wait` returns the finished tensor.

    ``parts``: the buffer holds as many ranks' parts, whose sum is the result. 0: the buffer is the result.
    """

    def __init__(
        self, work: dist.Work | None, buffer: torch.Tensor, keep: torch.Tensor | None = None, parts: int = 0
    ) -> None:
        self._work, self.buffer, self._keep = work, buffer, keep  # the tensor being sent must outlive the send
        self._parts = parts

    def wait(self) -> torch.Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = self._keep = None
            if self._parts:
                self.buffer = self.buffer.unflatten(0, (self._parts, -1)).sum(0)
        return self.buffer


def start_gather_sequence(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to gather ``[B, S / n, D]`` from all ranks into ``[n, B, S / n, D]``; `join_sequence` makes it ``[B, S, D]``."""
    x = x.contiguous()
    buffer = x.new_empty(axis.size, *x.shape)
    work = all_gather_single(buffer.flatten(0, 1), x, group=axis.group, async_op=True)
    return Pending(work, buffer, x)


def join_sequence(gathered: torch.Tensor) -> torch.Tensor:
    """``[n, B, S / n, D] -> [B, S, D]``."""
    return gathered.transpose(0, 1).flatten(1, 2)


def _adds_own_part(x: torch.Tensor) -> bool:
    """Whether ranks exchange the parts of ``x`` and each adds up its own."""
    return x.device.type == "cpu" and type(x) is torch.Tensor  # a FakeTensor stands for any device


def start_reduce_scatter(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to sum ``[n R, ...]`` over ranks; rank i keeps the i-th ``[R, ...]``.

    gloo's reduce-scatter sums everything on every rank. So on a CPU ranks exchange their parts, and each adds up its own:
    in a third to two thirds of the time (`benchmarks/README.md`).
    """
    if _adds_own_part(x):
        parts = torch.empty_like(x)
        return Pending(dist.all_to_all_single(parts, x, group=axis.group, async_op=True), parts, x, parts=axis.size)
    buffer = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return Pending(reduce_scatter_single(buffer, x, group=axis.group, async_op=True), buffer, x)


def reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of ``[n R, ...]`` over ranks, of which rank i keeps the i-th ``[R, ...]``."""
    return start_reduce_scatter(x, axis).wait()


def start_reduce_scatter_sequence(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to sum ``[B, S, D]`` over ranks; each rank keeps its part ``[B, S / n, D]`` of the sequence."""
    return start_reduce_scatter(x.unflatten(1, (axis.size, -1)).transpose(0, 1).contiguous().flatten(0, 1), axis)


class _AllReduce(torch.autograd.Function):
    """forward: sum over ranks. backward: sum over ranks of the gradients of the result."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return all_reduce_sum(x, axis)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce_sum(grad_outputs[0], ctx.axis), None


def all_reduce_with_gradient(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of ``x`` over ``axis``. Its backward sums the gradients of all ranks."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis)


class _ReduceScatterSequence(torch.autograd.Function):
    """forward: sum over ranks, each keeps its part of the sequence. backward: all-gather of the parts."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return start_reduce_scatter_sequence(x, axis).wait()

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return join_sequence(start_gather_sequence(grad_outputs[0], ctx.axis).wait()), None


def reduce_scatter_sequence(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Partial sums ``[B, S, D]`` on every rank -> this rank's part ``[B, S / n, D]`` of their sum."""
    return _ReduceScatterSequence.apply(x, axis)


class _GatherSequence(torch.autograd.Function):
    """forward: all-gather of this rank's part of the sequence. backward: sum over ranks, each keeps its part."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return join_sequence(start_gather_sequence(x, axis).wait())

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_reduce_scatter_sequence(grad_outputs[0], ctx.axis).wait(), None


def gather_sequence(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part ``[B, S / n, D]`` of the sequence -> all of it ``[B, S, D]``, for a matmul with its own columns."""
    return _GatherSequence.apply(x, axis)


class _AttachLoss(torch.autograd.Function):
    """forward: returns x. backward: passes x's gradient on and gives the loss a gradient of 1. ``loss`` thus joins the
    objective without being an output, so every pipeline stage can have losses of its own."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        ctx.mark_dirty(x)  # returns the same tensor at a new place in the graph: neither a copy nor a view
        return x

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_outputs[0], torch.ones_like(loss)


def attach_loss(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Return ``x`` (not a view) unchanged. Its backward adds the gradient of the scalar ``loss`` once, unscaled."""
    return _AttachLoss.apply(x, loss)
