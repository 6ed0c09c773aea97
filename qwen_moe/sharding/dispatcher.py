"""The token dispatcher across ranks: an all-to-all to the ranks that hold the experts, and one back."""

import itertools

import torch

from parallel.expert import Exchange, ExchangePlan, reorder
from parallel.mesh import Grids
from qwen_moe.models.moe.dispatch import Arrived, Route
from qwen_moe.models.ops.permute import Rows, combine, number_dropped, permute, permute_weights, sort_by_expert


class _Route:
    """Rows that travel among ranks: each step after `AllToAllDispatcher.send` waits for them or sends them on."""

    def __init__(self, exchange: Exchange, plan: ExchangePlan, rows: Rows, weights: torch.Tensor) -> None:
        self.exchange, self.plan, self.rows, self.weights = exchange, plan, rows, weights

    def receive(self, sent: torch.Tensor) -> Arrived:
        plan = self.plan
        states, weights = self.exchange.finish(plan, sent, self.weights)
        rows = Rows(plan.by_expert, plan.arrival.unsqueeze(1), plan.counts)
        return Arrived(states, rows, reorder(weights, plan.by_expert, plan.arrival).squeeze(1))

    def send_back(self, outputs: torch.Tensor) -> torch.Tensor:
        outputs = reorder(outputs, self.plan.arrival, self.plan.by_expert)
        (token,) = self.exchange.start(self.plan, outputs, back=True)
        return token

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        (rows,) = self.exchange.finish(self.plan, rows, back=True)
        return combine(rows, self.rows)


class AllToAllDispatcher:
    """Sends each choice to the ranks that hold its expert and brings the results back. Others compute between `send` and
    the steps of its route.

    Rows sorted by expert are also sorted by destination. With etp, each row goes to every rank that holds a slice of its
    expert, and `combine` sums the partial results (a token then has K * etp rows).
    """

    def __init__(self, grids: Grids, num_experts: int) -> None:
        self.num_experts, self.etp = num_experts, grids.etp.size
        self.exchange = Exchange(grids.exchange, grids.etp.size, num_experts)

    def send(
        self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, drops: bool
    ) -> tuple[torch.Tensor, Route]:
        rows, choice = sort_by_expert(indices, self.num_experts + drops)
        kept = indices.numel() - number_dropped(rows.counts) if drops else indices.numel()
        plan = self.exchange.plan(rows.counts[: self.num_experts], kept)
        if self.etp > 1:
            source, row = self._copies(rows, plan.send)
            rows, choice = rows._replace(token=rows.token[source], row=row), choice[source]
        total = sum(plan.send)  # dropped choices are last
        rows, choice = rows._replace(token=rows.token[:total]), choice[:total]
        of_rows = permute_weights(weights, choice, rows.row).unsqueeze(1)
        states_sent, weights_sent = self.exchange.start(plan, permute(x, rows), of_rows)
        return states_sent, _Route(self.exchange, plan, rows, weights_sent)

    def _copies(self, rows: Rows, send: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """With the rows of each ep destination repeated for its etp ranks, dropped rows last: which of ``rows`` each is, and
        those of each token ``[T, K * etp]``."""
        etp, device = self.etp, rows.token.device
        sizes = [*send[::etp], rows.token.numel() - sum(send[::etp])]
        position = torch.arange(rows.token.numel(), device=device)
        source = torch.cat([part.repeat(etp) for part in position.split(sizes)])
        # The copies of a block are consecutive: copy c of a row comes c block sizes after its first copy.
        begins = [0, *itertools.accumulate(sizes)][:-1]
        # Given `device`, torch.tensor would wait for a GPU to have the values.
        size, begin = torch.tensor([sizes, begins]).to(device, non_blocking=True)
        blocks = torch.arange(len(sizes), device=device)
        block = torch.repeat_interleave(blocks, size, output_size=position.numel())
        first = position + begin[block] * (etp - 1)
        copies = first.unsqueeze(1) + torch.arange(etp, device=device) * size[block].unsqueeze(1)
        return source, copies[rows.row].flatten(1)
