"""Routing replay in the model: the given experts are used, with the router's own weights and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwen_moe.config import ModelConfig
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import Router
from tests.small import small_model

SHAPE = (2, 5)


def config(family: str = "qwen2_moe", **changes: Any) -> ModelConfig:
    return small_model(family, **{"initializer_range": 0.3} | changes)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routing(*places: int, model: ModelConfig, known: float = 0.7, seed: int = 1) -> torch.Tensor:
    """Random experts ``[*places, K]``, and -1 in the places that are not ``known``."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(*places, model.num_experts, generator=generator).topk(model.num_experts_per_tok).indices
    return experts.where(torch.rand(*places, 1, generator=generator) < known, -1).to(torch.int16)


def plain_moe(moe: MoE, token: torch.Tensor, told: list[int]) -> torch.Tensor:
    """The layer's output for one token, in autograd's own operations, as the papers write it."""
    probs = (moe.gate.weight @ token).softmax(0)
    chosen = told if told[0] >= 0 else (probs + moe.gate.expert_bias).topk(moe.top_k).indices.tolist()
    total = torch.stack([probs[e] for e in chosen]).sum() if moe.gate.norm_topk_prob else 1.0
    y = torch.zeros_like(token)
    for e in chosen:
        gate, up = moe.experts.gate_up_proj[e]
        y = y + probs[e] / total * (moe.experts.down_proj[e] @ (F.silu(gate @ token) * (up @ token)))
    if moe.has_shared_expert:
        shared = moe.shared_expert
        inner = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
        y = y + torch.sigmoid(moe.shared_expert_gate.weight[0] @ token) * (shared.down_proj.weight @ inner)
    return y


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_values_and_gradients_equal_the_plain_formula(family: str, norm_topk_prob: bool) -> None:
    model = config(family, norm_topk_prob=norm_topk_prob)
    moe: MoE = build_model(model, 3, torch.float64).model.layers[0].mlp
    moe.gate.expert_bias.copy_(torch.tensor([0.0, 0.3, 0.0, -0.2, 0.0, 0.1]))
    told, upstream, results = routing(*SHAPE, model=model), rand(*SHAPE, 16, seed=5), []
    assert 0 < (told < 0).sum() < told.numel()
    for plain in (False, True):
        x = rand(*SHAPE, 16).requires_grad_()
        moe.zero_grad()
        if plain:
            y = torch.stack(
                [torch.stack([plain_moe(moe, *pair) for pair in zip(*row)]) for row in zip(x, told.tolist())]
            )
        else:
            y, statistics = moe(x, None, told)
        (y * upstream).sum().backward()
        grads = [p.grad.clone() for p in moe.parameters() if p.grad is not None]
        results.append([y.detach(), x.grad, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert moe.gate.weight.grad is not None and bool((moe.gate.weight.grad.abs().amax(1) > 1e-6).all())
    known = told.long()[told[..., 0] >= 0]
    assert bool((statistics.counts.sum(0) >= torch.bincount(known.flatten(), minlength=6)).all())
    assert statistics.counts.sum() == told.numel()


def test_a_token_without_experts_to_replay_is_routed_as_ever() -> None:
    router, x = Router(config()).double(), rand(*SHAPE, 16)
    router.weight.data = rand(6, 16, seed=4)
    unknown = torch.full((*SHAPE, 2), -1, dtype=torch.int16)
    plain, told = router(x), router(x, None, unknown)
    assert all(torch.equal(a, b) for a, b in zip((*plain[:2], *plain[2]), (*told[:2], *told[2])))


def chosen_by(model: DecoderLM, **fields: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The final states, and the experts ``[B, S, K]`` of each MoE layer."""
    found: list[torch.Tensor] = []
    ids = torch.arange(12).view(2, 6)
    hooks = [
        module.register_forward_hook(lambda _, inputs, out: found.append(out[1].view(2, 6, -1)))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    states, _ = model.hidden_states(ids, **fields)
    for hook in hooks:
        hook.remove()
    return states, found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_layer_replays_its_own_experts(recompute: str) -> None:
    shape = config(num_hidden_layers=4, mlp_only_layers=[1])
    model = build_model(shape, 2, torch.float64).train()
    model.recompute = recompute  # type: ignore[assignment]
    told = routing(2, 6, 3, model=shape, known=1.0)
    states, found = chosen_by(model, experts=told)
    assert len(found) == 3
    for place, indices in enumerate(found):
        assert torch.equal(indices, told[:, :, place].long())
    states.square().sum().backward()  # recomputed layers must replay too: torch compares what they save
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.recompute = "none"
    model.hidden_states(torch.arange(12).view(2, 6), experts=told)[0].square().sum().backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_replaying_the_own_routing_changes_no_bit(family: str) -> None:
    model = build_model(config(family), 2, torch.float32)
    states, found = chosen_by(model)
    again, _ = chosen_by(model, experts=torch.stack(found, 2).to(torch.int16))
    assert torch.equal(states, again)


def test_replay_reads_nothing_from_the_device() -> None:
    with torch.device("meta"):
        moe = MoE(small_model(hidden_size=64, moe_intermediate_size=32)).to(torch.bfloat16)
        x = torch.empty(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        y, _ = moe(x, None, torch.zeros(2, 16, 2, dtype=torch.int16))
    y.sum().backward()
