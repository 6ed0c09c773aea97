"""The token dispatcher across ranks: an all-to-all to the ranks that hold the experts, and one back."""

import itertools

import torch
from torch import nn

from parallel.expert import Exchange, ExchangePlan, reorder
from parallel.mesh import Grids
from qwen_moe.models.moe.dispatch import Route
from qwen_moe.models.ops.permute import Permutation, combine, permute, sort_by_expert


class _Route:
    """Rows that travel among ranks: each step after `AllToAllDispatcher.send` waits for them or sends them on."""

    def __init__(self, exchange: Exchange, plan: ExchangePlan, order: Permutation, etp: int) -> None:
        self.exchange, self.plan, self.order, self.etp = exchange, plan, order, etp

    def receive(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        arrived = self.exchange.finish(rows, self.plan)
        return reorder(arrived, self.plan.by_expert, self.plan.arrival), self.plan.counts

    def send_back(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.exchange.start(reorder(outputs, self.plan.arrival, self.plan.by_expert), self.plan, back=True)

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = self.exchange.finish(rows, self.plan, back=True)
        if lost := self.order.token.numel() - rows.shape[0]:  # dropped choices stay zero
            rows = nn.functional.pad(rows, (0, 0, 0, lost))
        if self.etp > 1:
            weights = weights.repeat_interleave(self.etp, dim=1)
        return combine(rows, weights, self.order)


class AllToAllDispatcher:
    """Sends each choice to the ranks that hold its expert and brings the results back. Others compute between `send` and
    the steps of its route.

    Rows sorted by expert are also sorted by destination. With etp, each row goes to every rank that holds a slice of its
    expert, and `combine` sums the partial results (a token then has K * etp rows).
    """

    def __init__(self, grids: Grids, num_experts: int) -> None:
        self.num_experts, self.etp = num_experts, grids.etp.size
        self.exchange = Exchange(grids.exchange, grids.etp.size, num_experts)

    def send(self, x: torch.Tensor, indices: torch.Tensor, drops: bool) -> tuple[torch.Tensor, Route]:
        order = sort_by_expert(indices, self.num_experts + drops)
        counts = order.counts[: self.num_experts]
        kept = indices.numel() - int(order.counts[-1]) if drops else indices.numel()
        plan = self.exchange.plan(counts, kept)
        if self.etp > 1:
            order = self._copies(order, plan.send)
        rows = permute(x, order)[: sum(plan.send)]
        return self.exchange.start(rows, plan), _Route(self.exchange, plan, order, self.etp)

    def _copies(self, order: Permutation, send: list[int]) -> Permutation:
        """``order`` with the rows of each ep destination repeated for its etp ranks; dropped rows stay last."""
        etp, device = self.etp, order.token.device
        sizes = [*send[::etp], order.token.numel() - sum(send[::etp])]
        position = torch.arange(order.token.numel(), device=device)
        source = torch.cat([part.repeat(etp) for part in position.split(sizes)])
        # The copies of a block are consecutive: copy c of a row comes c block sizes after its first copy.
        begins = [0, *itertools.accumulate(sizes)][:-1]
        # Given `device`, torch.tensor would wait for a GPU to have the values.
        size, begin = torch.tensor([sizes, begins]).to(device, non_blocking=True)
        blocks = torch.arange(len(sizes), device=device)
        block = torch.repeat_interleave(blocks, size, output_size=position.numel())
        first = position + begin[block] * (etp - 1)
        copies = first.unsqueeze(1) + torch.arange(etp, device=device) * size[block].unsqueeze(1)
        return Permutation(order.token[source], copies[order.row].flatten(1), order.counts)
