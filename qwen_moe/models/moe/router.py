"""Top-k softmax router and the statistics that balancing and metrics need.

Shapes: B sequences, T = B * S tokens, D hidden, E experts, K top-k.
"""

from typing import NamedTuple

import torch
from torch import nn

from qwen_moe.config import ModelConfig
from qwen_moe.models.ops.routing import logits_of, picked_and_sums, probabilities


class RouterStatistics(NamedTuple):
    """Sums over tokens, never means, kept per sequence so that every balancing scope can be computed from them.

    They are outputs of the layer, so that recomputing a layer in backward cannot count a token twice. Padding, where a batch
    says which tokens it is, is in none of them.
    """

    prob_sum: torch.Tensor  # [B, E] float32 (float64 for float64 models), differentiable
    counts: torch.Tensor  # [B, E] int64, assignments of tokens to experts
    z_sum: torch.Tensor  # [B], sum of logsumexp(logits)^2, differentiable
    dropped: torch.Tensor  # [B] int64, choices beyond an expert's capacity


class Router(nn.Module):
    """``forward(x [B, S, D]) -> (weights [T, K] in x's dtype, indices [T, K], RouterStatistics)``.

    Softmax over all experts in float32, then top-k, as Qwen does. Logits are computed in float32 too: rounded to bfloat16
    they would have about three digits, and near-ties would flip between a forward and its recomputation.
    ``expert_bias`` (arXiv 2408.15664) affects the selection only, never the weights.

    Routing replay (arXiv 2510.11370) gives the selection of each token: ``experts [B, S, K]``, or -1 in all K places where
    the router selects itself. The weights are always its own, gathered from the softmax over all experts, so that gradients
    reach it as if it had selected these experts.
    """

    expert_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(
        self, x: torch.Tensor, counted: torch.Tensor | None = None, experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, RouterStatistics]:
        """``counted [B, S]``: the tokens that the statistics are of (by default all). ``experts [B, S, K]``: see the class;
        the statistics count them as they count the router's own choices."""
        batch = x.shape[0]
        found = probabilities(x, self.weight)
        indices = self._select(found[0], experts)
        picked, prob_sum, z_sum = picked_and_sums(x, self.weight, found, indices, counted)
        per_sequence = indices.view(batch, -1)
        ones = torch.ones_like(per_sequence)
        if counted is not None:
            ones = counted.repeat_interleave(self.top_k, dim=1).to(ones.dtype)
        statistics = RouterStatistics(
            prob_sum=prob_sum,
            counts=torch.zeros_like(prob_sum, dtype=torch.int64).scatter_add_(1, per_sequence, ones),
            z_sum=z_sum,
            dropped=torch.zeros(batch, dtype=torch.int64, device=x.device),
        )
        return weights_of(picked, self.norm_topk_prob).to(x.dtype), indices, statistics

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` without statistics and gradients, for generation."""
        probs = logits_of(x, self.weight).softmax(-1)
        weights, indices = choose(probs, self.expert_bias, self.top_k, self.norm_topk_prob)
        return weights.to(x.dtype), indices

    def _select(self, probs: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        return select(probs, self.expert_bias, self.top_k, experts)


def select(probs: torch.Tensor, bias: torch.Tensor, top_k: int, experts: torch.Tensor | None = None) -> torch.Tensor:
    """Experts ``[T, K]`` of tokens with ``probs [T, E]``. ``bias [E]`` is added for the choice only. ``experts``: chosen
    before, see `Router`."""
    indices = torch.topk(probs + bias, top_k, dim=-1, sorted=True).indices
    if experts is None:
        return indices
    given = experts.flatten(0, -2).to(indices.dtype)
    return torch.where(given >= 0, given, indices)


def weights_of(picked: torch.Tensor, normalized: bool) -> torch.Tensor:
    """The weights of experts with the probabilities ``picked [T, K]``. They sum to 1 if ``normalized``."""
    return picked / picked.sum(-1, keepdim=True) if normalized else picked


def choose(probs: torch.Tensor, bias: torch.Tensor, top_k: int, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts ``[T, K]`` of tokens with ``probs [T, E]``, see `select` and `weights_of`."""
    indices = select(probs, bias, top_k)
    return weights_of(probs.gather(-1, indices), normalized), indices
