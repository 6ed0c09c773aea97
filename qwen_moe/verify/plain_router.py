"""The router and routing replay as their papers write them, with a mask of all experts: what `verify` compares with.

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


def use_plain_routers(model: DecoderLM) -> None:
    """Replace the routers of ``model`` by plain ones with the same parameters."""
    for router in _blocks(model):
        plain = PlainRouter(model.config)
        plain.weight, plain.expert_bias = router.gate.weight, router.gate.expert_bias
        router.gate = plain


def replaying(model: DecoderLM, experts: torch.Tensor | None) -> None:
    """Tell every MoE layer of ``model`` its part of ``experts [b, s, L, K]`` for the next forward; None: replay nothing."""
    for place, block in enumerate(_blocks(model)):
        assert isinstance(block.gate, PlainRouter)
        block.gate.told = None if experts is None else experts[:, :, place]


def _blocks(model: DecoderLM) -> list[MoE]:
    return [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
