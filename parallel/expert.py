"""All-to-all of token rows among the ranks that share experts, overlapped with other work.

Shapes: E experts, R = ep * etp ranks of an exchange, L = E / ep experts of a rank, N rows sent, M rows received.
The rank with index ``i`` holds the L experts from ``(i // etp) * L`` on, and slice ``i % etp`` of their hidden dim.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from parallel.collectives import Pending
from parallel.mesh import Axis


@dataclass
class ExchangePlan:
    """How many rows each rank sends to each other in one layer, and the order that sorts received rows by expert."""

    send: list[int]
    receive: list[int]
    counts: torch.Tensor  # [L] rows of each local expert
    by_expert: torch.Tensor  # [M] index: rows in order of arrival -> sorted by expert
    arrival: torch.Tensor  # [M] the inverse
    out: list[Pending] = field(default_factory=list, repr=False)  # on their way in forward
    back: list[Pending] = field(default_factory=list, repr=False)  # and in backward


class Exchange:
    """The all-to-all of one MoE layer over ``axis`` (index = ep_index * etp + etp_index)."""

    def __init__(self, axis: Axis, etp: int, num_experts: int) -> None:
        self.axis, self.etp, self.num_experts = axis, etp, num_experts
        self.local_experts = num_experts * etp // axis.size

    def plan(self, counts: torch.Tensor, rows: int) -> ExchangePlan:
        """Exchange row counts. ``counts [E]``: this rank's rows per expert; ``rows``: their sum, before copies for etp.

        The host waits for them. Where another message is in flight, they queue behind it, as the rows do that follow.
        """
        ranks, local = self.axis.size, self.local_experts
        # Every rank that holds a slice of an expert (etp) needs all of the expert's rows.
        outgoing = counts.view(-1, 1, local).expand(-1, self.etp, local).reshape(ranks, local)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing.contiguous(), group=self.axis.group)
        sizes = torch.stack([outgoing.sum(1), incoming.sum(1)]).cpu()  # where the host waits for the device
        if isinstance(counts, FakeTensor):  # a shape-only run has no values: assume balanced routing
            holders = ranks // self.etp
            shares = [rows // holders + (rows % holders if i == 0 else 0) for i in range(holders)]
            send = [share for share in shares for _ in range(self.etp)]
            receive = list(send)
        else:
            send, receive = sizes.tolist()
        total = sum(receive)
        expert = torch.arange(local, device=counts.device).repeat(ranks)
        of_row = torch.repeat_interleave(expert, incoming.flatten(), output_size=total)
        by_expert = of_row.argsort(stable=True)
        arrival = torch.empty_like(by_expert)
        arrival[by_expert] = torch.arange(total, device=counts.device)
        return ExchangePlan(send, receive, incoming.sum(0), by_expert, arrival)

    def start(self, plan: ExchangePlan, *rows: torch.Tensor, back: bool = False) -> tuple[torch.Tensor, ...]:
        """Begin to send each of ``rows [N, ...]``, sorted by destination, or with ``back`` to return ``rows [M, ...]``, in
        order of arrival, to their senders. Returns a token of each for `finish`, of its shape but without memory. Do other
        work between; other messages of the same plan may not begin before."""
        return _Start.apply(plan, self.axis, back, *rows)

    def finish(self, plan: ExchangePlan, *tokens: torch.Tensor, back: bool = False) -> tuple[torch.Tensor, ...]:
        """The rows received: ``[M, ...]`` in order of arrival, or with ``back`` ``[N, ...]`` in the order sent."""
        return _Finish.apply(plan, self.axis, back, *tokens)


def _launch(rows: torch.Tensor, plan: ExchangePlan, axis: Axis, back: bool) -> Pending:
    send, receive = (plan.receive, plan.send) if back else (plan.send, plan.receive)
    rows = rows.contiguous()
    buffer = rows.new_empty(sum(receive), *rows.shape[1:])
    work = dist.all_to_all_single(buffer, rows, receive, send, group=axis.group, async_op=True)
    return Pending(work, buffer, rows)


class _Start(torch.autograd.Function):
    """forward: launch the all-to-alls. The outputs are tokens; the rows arrive in ``plan.out``.
    backward: wait for the reverse all-to-alls that `_Finish.backward` launched. Work between the two overlaps.

    Autograd runs nodes in the reverse order of their creation. So where forward computes something between a start and a
    finish, backward computes the gradient of it between the launch and the wait."""

    @staticmethod
    def forward(ctx, plan: ExchangePlan, axis: Axis, back: bool, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.plan = plan
        assert not plan.out
        plan.out = [_launch(x, plan, axis, back) for x in rows]
        # One element, whatever the shape: the rows themselves can be freed when they are sent. Not a view, of which FSDP
        # warns.
        return tuple(torch.empty_strided(x.shape, (0,) * x.ndim, dtype=x.dtype, device=x.device) for x in rows)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert len(ctx.plan.back) == len(grad_outputs)
        pending, ctx.plan.back = ctx.plan.back, []
        for one in pending:
            one.wait()
        return None, None, None, *grad_outputs


class _Finish(torch.autograd.Function):
    """forward: wait for the rows. backward: launch the reverse all-to-alls of their gradients and return the buffers. A
    buffer has its token's shape and is filled once `_Start.backward` has waited."""

    @staticmethod
    def forward(ctx, plan: ExchangePlan, axis: Axis, back: bool, *tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.axis, ctx.back = plan, axis, back
        assert len(plan.out) == len(tokens)
        pending, plan.out = plan.out, []
        return tuple(one.wait() for one in pending)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.plan.back = [_launch(dy, ctx.plan, ctx.axis, not ctx.back) for dy in grad_outputs]
        return None, None, None, *(one.buffer for one in ctx.plan.back)


class _Reorder(torch.autograd.Function):
    """forward: rows[index]. backward: gradient[inverse], a gather instead of a scatter-add, hence deterministic."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, inverse), None, None


def reorder(rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``rows [M, D]`` in the order of the permutation ``index [M]``, whose inverse is ``inverse [M]``."""
    return _Reorder.apply(rows, index, inverse)
