"""The MoE block: router, dispatch of tokens to experts and back, and a gated shared expert.

Shapes: B batch, S sequence, T = B * S tokens, D hidden, E experts, K top-k.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qwen_moe.config import ModelConfig
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.linear import Linear
from qwen_moe.models.moe.dispatch import Dispatcher, LocalDispatcher, Route
from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.moe.router import Router, RouterStatistics
from qwen_moe.models.sequence import SequencePart, WholeSequence


def within_capacity(
    indices: torch.Tensor,
    num_experts: int,
    capacity: int | torch.Tensor,
    sequence: SequencePart,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whether each choice of ``indices [B, S, K]`` is among its expert's first ``capacity`` in its sequence: ``[B, S, K]``.
    ``capacity`` may be of each sequence, ``[B, 1]``.

    Choices are served in order of position, whatever part of ``sequence`` is here, so that later tokens do not affect
    earlier ones. The choices of tokens outside ``counted [B, S]`` take no place and get none.
    """
    batch, _, top_k = indices.shape
    flat = indices.flatten(1)
    chosen = F.one_hot(flat, num_experts)
    if counted is not None:
        chosen = chosen * counted.repeat_interleave(top_k, dim=1).unsqueeze(2)
    chosen = chosen.unflatten(1, (sequence.segments, -1))  # [B, segments, S * K / segments, E]
    before = (chosen.cumsum(2) - chosen + sequence.earlier(chosen.sum(2)).unsqueeze(2)).flatten(1, 2)
    kept = (before.gather(2, flat.unsqueeze(2)).squeeze(2) < capacity).view(batch, -1, top_k)
    return kept if counted is None else kept & counted.unsqueeze(2)


class Sent(NamedTuple):
    """Tokens whose rows are on their way to experts, or back, and what they get besides."""

    rows: torch.Tensor  # what `route` knows of them
    route: Route
    shared: torch.Tensor | None  # [B, S, D], the shared expert's output

    def received(self, like: torch.Tensor) -> torch.Tensor:
        """Wait for the rows that the experts send back: the block's output, in the shape of ``like [B, S, D]``."""
        y = self.route.combine(self.rows).view_as(like)
        return y if self.shared is None else y + self.shared


class MoE(nn.Module):
    """``forward(x [B, S, D]) -> (y [B, S, D], RouterStatistics)``: routed experts plus the sigmoid-gated shared one.

    ``capacity_factor`` > 0 lets an expert serve at most ``ceil(capacity_factor * S * K / E)`` choices of a sequence in
    training; the rest are dropped and counted. Capacity is per sequence, so that the layout does not change what is dropped.
    Padding is no part of S: it takes no expert's capacity, is not served, and does not count as dropped.

    `forward` is `send`, `through_experts` and `Sent.received`. Between them rows may travel, and a caller with several parts
    of a micro-batch computes another part meanwhile.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.capacity_factor = 0.0
        self.has_shared_expert = config.shared_expert_intermediate_size > 0
        if self.has_shared_expert:
            self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)
        # Sharding replaces these where experts or sequences are split over ranks.
        self.dispatcher: Dispatcher = LocalDispatcher(config.num_experts)
        self.sequence: SequencePart = WholeSequence()

    def _shared(self, x: torch.Tensor) -> torch.Tensor | None:
        if not self.has_shared_expert:
            return None
        return self.shared_expert(x, self.shared_expert_gate(x).sigmoid())

    def forward(
        self, x: torch.Tensor, counted: torch.Tensor | None = None, experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """``counted``: of whole sequences, on every device, the tokens that are not padding (by default all). ``experts
        [B, S, K]``: those of each token of ``x`` in routing replay, see `Router`. Capacity holds for them too."""
        sent, statistics = self.send(x, counted, experts)
        (back,) = self.through_experts([sent])
        return back.received(x), statistics

    def send(
        self, x: torch.Tensor, counted: torch.Tensor | None = None, experts: torch.Tensor | None = None
    ) -> tuple[Sent, RouterStatistics]:
        """Choose experts, begin to send the rows to them, and compute the shared expert meanwhile."""
        held = None if counted is None else self.sequence.held_of(counted)
        weights, indices, statistics = self.gate(x, held, experts)
        drops = self.capacity_factor > 0 and self.training
        if drops:
            per_sequence = indices.view(*x.shape[:2], -1)
            capacity = self._capacity(x.shape[1], counted)
            kept = within_capacity(per_sequence, self.num_experts, capacity, self.sequence, held)
            lost = ~kept if held is None else ~kept & held.unsqueeze(2)
            statistics = statistics._replace(dropped=lost.flatten(1).sum(1))
            kept = kept.view_as(indices)
            weights, indices = weights * kept, indices.masked_fill(~kept, self.num_experts)
        return self._send(x, weights, indices, drops), statistics

    def _send(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, drops: bool) -> Sent:
        rows, route = self.dispatcher.send(x.flatten(0, -2), weights, indices, drops)
        return Sent(rows, route, self._shared(x))

    def through_experts(self, parts: Sequence[Sent]) -> list[Sent]:
        """Wait for the rows of each part in turn, run the experts and begin to send the results back."""
        rows = self.experts([part.rows for part in parts], [part.route for part in parts])
        return [part._replace(rows=one) for part, one in zip(parts, rows, strict=True)]

    def _capacity(self, held: int, counted: torch.Tensor | None) -> int | torch.Tensor:
        """How many choices an expert serves of a sequence; of each, ``[B, 1]``, where they differ in length."""
        if counted is None:
            length = self.sequence.whole_length(held)
            return math.ceil(self.capacity_factor * length * self.top_k / self.num_experts)
        lengths = counted.sum(1, keepdim=True).double()
        return (self.capacity_factor * lengths * self.top_k / self.num_experts).ceil()

    def read(self, x: torch.Tensor, chosen: list[torch.Tensor] | None = None) -> torch.Tensor:
        """``forward`` for generation: without statistics and without dropping choices. ``chosen`` receives the experts
        ``[T, K]``."""
        weights, indices = self.gate.choose(x)
        if chosen is not None:
            chosen.append(indices)
        (back,) = self.through_experts([self._send(x, weights, indices, drops=False)])
        return back.received(x)
