"""Mixture of experts as the papers write it: a router with a mask of all experts, routing replay, capacity by counting one
choice after another, and each expert computed for every token. `verify` compares with it.

A layer is told the experts of its tokens directly, not through the model. Shapes: b rows of s tokens, E experts, K top-k.
"""

import torch
import torch.nn.functional as F

from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import Router, RouterStatistics


class PlainRouter(Router):
    """See `Router`. ``told [b, s, K]``: the experts of the tokens of the next forward, or -1."""

    told: torch.Tensor | None = None

    def forward(
        self, x: torch.Tensor, counted: torch.Tensor | None = None, experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, RouterStatistics]:
        assert experts is None, "the reference tells layers their experts with `replaying`"
        probs = (x @ self.weight.T).softmax(-1)  # [b, s, E]
        chosen = self._mask((probs.detach() + self.expert_bias).topk(self.top_k).indices)
        if self.told is not None:
            own = self.told[..., :1] < 0
            chosen = chosen.where(own, self._mask(self.told.long().clamp_min(0)))
        weights = probs * chosen
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        present = torch.ones(x.shape[:2], dtype=torch.bool) if counted is None else counted
        seen = present.unsqueeze(-1)
        statistics = RouterStatistics(
            prob_sum=(probs * seen).sum(1),
            counts=(chosen & seen).sum(1),
            z_sum=((x @ self.weight.T).exp().sum(-1).log() ** 2 * present).sum(1),
            dropped=torch.zeros(len(x), dtype=torch.int64),
        )
        indices = chosen.flatten(0, 1).nonzero()[:, 1].view(-1, self.top_k)
        return weights.flatten(0, 1).gather(1, indices), indices, statistics

    def _mask(self, indices: torch.Tensor) -> torch.Tensor:
        return F.one_hot(indices, len(self.weight)).sum(-2).bool()


class PlainMoE(MoE):
    """See `MoE`."""

    def forward(
        self, x: torch.Tensor, counted: torch.Tensor | None = None, experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RouterStatistics]:
        weights, indices, statistics = self.gate(x, counted, experts)
        weights, indices = weights.view(*x.shape[:2], -1), indices.view(*x.shape[:2], -1)
        if self.capacity_factor and self.training:
            present = torch.ones(x.shape[:2], dtype=torch.bool) if counted is None else counted
            served = torch.stack([self._served(*row) for row in zip(indices, present, strict=True)])
            statistics = statistics._replace(dropped=(~served & present.unsqueeze(-1)).flatten(1).sum(1))
            weights = weights * served
        y = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(self.experts.gate_up_proj, self.experts.down_proj, strict=True)):
            weight = (weights * (indices == expert)).sum(-1, keepdim=True)  # [b, s, 1], 0 for tokens of other experts
            y = y + weight * ((F.silu(x @ gate_up[0].T) * (x @ gate_up[1].T)) @ down.T)
        if self.has_shared_expert:
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y, statistics

    def _served(self, indices: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Which choices of one sequence are served: ``indices [s, K]``, ``present [s]`` -> ``[s, K]``."""
        load = [0] * self.num_experts
        served = torch.zeros_like(indices, dtype=torch.bool)
        for place in present.nonzero().flatten().tolist():
            for choice, expert in enumerate(indices[place].tolist()):
                load[expert] += 1
                served[place, choice] = (
                    load[expert] - 1 < self.capacity_factor * int(present.sum()) * self.top_k / self.num_experts
                )
        return served


def use_plain_moe(model: DecoderLM) -> None:
    """Replace the mixtures of experts of ``model`` by plain ones with the same parameters."""
    for layer in model.model.layers:
        if not isinstance(layer.mlp, MoE):
            continue
        plain, router = PlainMoE(model.config), PlainRouter(model.config)
        router.weight, router.expert_bias = layer.mlp.gate.weight, layer.mlp.gate.expert_bias
        plain.gate, plain.experts = router, layer.mlp.experts
        if plain.has_shared_expert:
            plain.shared_expert, plain.shared_expert_gate = layer.mlp.shared_expert, layer.mlp.shared_expert_gate
        layer.mlp = plain


def replaying(model: DecoderLM, experts: torch.Tensor | None) -> None:
    """Tell every MoE layer of ``model`` its part of ``experts [b, s, L, K]`` for the next forward; None: replay nothing."""
    for place, block in enumerate(_blocks(model)):
        assert isinstance(block.gate, PlainRouter)
        block.gate.told = None if experts is None else experts[:, :, place]


def _blocks(model: DecoderLM) -> list[MoE]:
    return [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
