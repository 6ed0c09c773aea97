"""The token dispatcher across ranks: an all-to-all to the ranks that hold the experts, and one back."""

import itertools
from collections.abc import Callable

import torch
from torch import nn

from parallel.expert import Exchange, reorder
from parallel.mesh import Grids
from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.ops.permute import Permutation, combine, permute, sort_by_expert


class AllToAllDispatcher:
    """Sends each choice to the ranks that hold its expert and brings the results back; ``overlap`` runs meanwhile.

    Rows sorted by expert are also sorted by destination. With etp, each row goes to every rank that holds a slice of its
    expert, and `combine` sums the partial results (a token then has K * etp rows).
    """

    def __init__(self, grids: Grids, num_experts: int) -> None:
        self.num_experts, self.etp = num_experts, grids.etp.size
        self.exchange = Exchange(grids.exchange, grids.etp.size, num_experts)

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        experts: Experts,
        overlap: Callable[[], torch.Tensor | None],
        drops: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        order = sort_by_expert(indices, self.num_experts + drops)
        counts = order.counts[: self.num_experts]
        kept = indices.numel() - int(order.counts[-1]) if drops else indices.numel()
        plan = self.exchange.plan(counts, kept)
        total = order.token.numel() * self.etp
        if self.etp > 1:
            order = self._copies(order, plan.send)
            weights = weights.repeat_interleave(self.etp, dim=1)
        sent = sum(plan.send)
        token = self.exchange.start(permute(x, order)[:sent], plan)
        overlapped = overlap()
        arrived = self.exchange.finish(token, plan)
        outputs = experts(reorder(arrived, plan.by_expert, plan.arrival), plan.counts)
        rows = self.exchange.send_back(reorder(outputs, plan.arrival, plan.by_expert), plan)
        if sent < total:  # dropped choices stay zero
            rows = nn.functional.pad(rows, (0, 0, 0, total - sent))
        return combine(rows, weights, order), overlapped

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
