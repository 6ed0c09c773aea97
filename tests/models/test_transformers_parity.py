"""Every family equals transformers' in true float64: logits, loss, auxiliary loss and every gradient."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_moe.config import ModelConfig
from qwen_moe.config import families as table
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.moe.router import RouterStatistics
from tests.models.hf_reference import FAMILIES, draw_weights, hf_model, model_configs, to_hf_names, true_float64
from tests.small import small_model

TOLERANCE = 1e-10
AUX_COEFFICIENT = 0.37


def pooled_auxiliary_loss(router: RouterStatistics, config: ModelConfig) -> torch.Tensor:
    """transformers' load_balancing_loss_func: E * sum_e f_e P_e, f and P pooled over layers and tokens; f sums to k."""
    counts = router.counts.sum((0, 1)).to(router.prob_sum.dtype)
    rows = counts.sum() / config.num_experts_per_tok
    return config.num_experts * (counts / rows * router.prob_sum.sum((0, 1)) / rows).sum()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float64
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def differences(
    ours: DecoderLM, seed: int, batch: int, seq: int, reference: DecoderLM | None = None
) -> dict[str, float]:
    """Relative differences of everything that is compared, by name; transformers gets the weights of ``reference``."""
    config = ours.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (batch, seq), generator=generator)
    labels = torch.where(torch.rand(batch, seq, generator=generator) < 0.2, -100, ids)
    labels[:, -1] = ids[:, -1]
    with true_float64():
        moe = {"router_aux_loss_coef": AUX_COEFFICIENT, "output_router_logits": True} if config.is_moe_family else {}
        theirs = hf_model(reference or ours, **moe)
        expected = theirs(input_ids=ids, labels=labels)
        expected.loss.backward()

    next_labels = torch.cat([labels[:, 1:], labels.new_full((batch, 1), -100)], dim=1)
    sums = ours.loss_sums(ids, next_labels, chunk_tokens=5)
    loss = sums.cross_entropy / sums.tokens
    result = {"logits": relative(ours(ids), expected.logits)}
    if sums.router is not None:
        auxiliary = pooled_auxiliary_loss(sums.router, config)
        result["auxiliary loss"] = relative(auxiliary, expected.aux_loss)
        loss = loss + AUX_COEFFICIENT * auxiliary
    result["loss"] = relative(loss, expected.loss)
    ours.zero_grad()
    loss.backward()
    gradients = to_hf_names({name: parameter.grad for name, parameter in ours.named_parameters()})
    expected_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values() if gradient is not None)
    for name, gradient in gradients.items():
        other = expected_gradients[name]
        if other is None or float(other.abs().max()) < 1e-12 * scale:
            # A mathematical zero (such as a key's bias, or weights that sum to one): noise has no relative size.
            result[f"gradient of {name}"] = float(gradient.abs().max()) / scale
        else:
            result[f"gradient of {name}"] = relative(gradient, other)
    return result


def worst(found: dict[str, float]) -> tuple[float, str]:
    return max((value, name) for name, value in found.items())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_equal_to_transformers(family: str, data: st.DataObject) -> None:
    config = data.draw(model_configs((family,)))
    seed, batch, seq = data.draw(st.integers(0, 2**20)), data.draw(st.integers(1, 3)), data.draw(st.integers(2, 17))
    value, name = worst(differences(draw_weights(config, seed), seed, batch, seq))
    assert value < TOLERANCE, (name, value)


def _swap_gate_and_up(model: DecoderLM) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj.data = experts.gate_up_proj.data.flip(1)


def _transpose_one_expert(model: DecoderLM) -> None:
    weight = model.model.layers[0].mlp.experts.down_proj.data
    weight[3] = weight[3].T.clone()


def _drop_value_bias(model: DecoderLM) -> None:
    model.model.layers[0].self_attn.v_proj.bias.data.zero_()


def _forget_normalization(model: DecoderLM) -> None:
    model.model.layers[0].mlp.gate.norm_topk_prob = False


def _swap_two_experts(model: DecoderLM) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data[[0, 1]] = experts.down_proj.data[[1, 0]].clone()


@pytest.mark.parametrize(
    "break_it", [_swap_gate_and_up, _transpose_one_expert, _drop_value_bias, _forget_normalization, _swap_two_experts]
)
def test_comparison_sees_mistakes(break_it: Callable[[DecoderLM], None]) -> None:
    """The comparison is not blind: after a typical conversion mistake on our side it is off by far more than rounding."""
    config = small_model(norm_topk_prob=True, moe_intermediate_size=16)  # as the hidden size, so that a transpose fits
    ours = draw_weights(config, 3)
    assert worst(differences(ours, 3, 2, 12))[0] < TOLERANCE
    break_it(ours)
    assert worst(differences(ours, 3, 2, 12, reference=draw_weights(config, 3)))[0] > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_true_float64(family: str) -> None:
    """Without the mode transformers' float64 model is 1e-9 or more away; the comparison above would not mean much."""
    ours = draw_weights(small_model(family, norm_topk_prob=table.FAMILIES[family].moe), 1)
    ids = torch.arange(20).view(2, 10)
    loose = hf_model(ours)(input_ids=ids).logits
    with true_float64():
        true = hf_model(ours)(input_ids=ids).logits
    assert relative(ours(ids), true) < TOLERANCE
    assert relative(loose, true) > 1e-9
