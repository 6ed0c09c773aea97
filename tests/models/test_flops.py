"""Counts of parameters and FLOPs against built modules, torch's own counter and published figures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.flops import count_parameters, flops_per_token, training_bytes
from qwen_moe.models.ops.permute import permute
from tests.models.hf_reference import FAMILIES, model_configs
from tests.models.test_layers import small_config


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data())
def test_parameters_equal_those_of_the_built_module(family: str, data: st.DataObject) -> None:
    config: ModelConfig = data.draw(model_configs((family,)))
    with torch.device("meta"):
        model = DecoderLM(config)
    named = {name: p.numel() for name, p in model.named_parameters()}
    counts = count_parameters(config)
    assert counts.total == sum(named.values())
    vocabulary = sum(n for name, n in named.items() if "embed_tokens" in name or "lm_head" in name)
    assert counts.non_vocabulary_total == counts.total - vocabulary
    routed = sum(n for name, n in named.items() if ".experts." in name)
    if routed:
        idle = routed * (config.num_experts - config.num_experts_per_tok) // config.num_experts
        assert counts.activated == counts.total - idle
    else:
        assert counts.activated == counts.total


# Billions, total and activated, as the models' publishers state them.
PUBLISHED = {
    "qwen1.5-moe-a2.7b": (14.32, 2.69),
    "qwen2-57b-a14b": (57.41, 14.25),
    "qwen3-30b-a3b": (30.53, 3.35),
    "qwen3-235b-a22b": (235.09, 22.19),
    "qwen2.5-0.5b": (0.49, 0.49),
    "qwen2.5-1.5b": (1.54, 1.54),
    "qwen2.5-3b": (3.09, 3.09),
    "qwen2.5-7b": (7.62, 7.62),
    "qwen2.5-14b": (14.77, 14.77),
    "qwen2.5-32b": (32.76, 32.76),
    "qwen2.5-72b": (72.71, 72.71),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    counts = count_parameters(parse_model({"preset": name}, name))
    assert (round(counts.total / 1e9, 2), round(counts.activated / 1e9, 2)) == PUBLISHED[name]


def test_forward_flops_equal_torchs_count() -> None:
    """torch has no count for its CPU attention kernel and the experts' rows are data: those two are counted by hand."""
    batch, seq, layers, heads, head_dim = 2, 24, 3, 4, 4
    config = small_config(num_hidden_layers=layers, mlp_only_layers=(1,))
    with torch.device("meta"):
        model = DecoderLM(config)
    for layer in (0, 2):
        model.model.layers[layer].mlp.experts.compute = lambda arrived: permute(arrived.states, arrived.rows)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(batch, seq, dtype=torch.int64))
    ours = flops_per_token(config, seq)
    rest = ours.forward - ours.attention_scores - ours.routed_experts
    assert counter.get_total_flops() / (batch * seq) == pytest.approx(rest, rel=1e-12)
    keys = sum(range(1, seq + 1)) / seq  # a query at position p sees p + 1 keys
    assert ours.attention_scores == layers * 2 * (2 * heads * head_dim * keys)  # q k^T and p v
    assert ours.routed_experts == 2 * 2 * (3 * 2 * 16 * 8)  # 2 MoE layers, 2 experts, 3 matrices of 16 x 8
    assert ours.training == 3 * ours.forward


def test_training_bytes() -> None:
    config = small_config()
    total = count_parameters(config).total
    mixed, pure = training_bytes(config, "bf16", "fp32"), training_bytes(config, "bf16", "bf16")
    assert (mixed.weights, mixed.master_weights, mixed.gradients, mixed.optimizer) == tuple(
        total * n for n in (2, 4, 4, 8)
    )
    assert (pure.weights, pure.master_weights, pure.gradients, pure.optimizer) == tuple(total * n for n in (2, 0, 2, 4))
