"""The head of a reward model: against plain autograd, and what the model is with it."""

import pytest
import torch

from qwen_moe.config import ModelConfig
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.flops import count_parameters, flops_per_token
from qwen_moe.models.head.scores import linear_scores
from qwen_moe.models.init import build_model
from tests.small import small_model

CRITERIA = ("helpful", "concise", "truthful")


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def test_scores_and_gradients_equal_plain_autograd() -> None:
    x, weight, upstream = leaf(2, 5, 16), leaf(3, 16), leaf(2, 5, 3).detach()
    (linear_scores(x, weight) * upstream).sum().backward()
    plain_x, plain_weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    (torch.einsum("bsd,cd->bsc", plain_x, plain_weight) * upstream).sum().backward()
    torch.testing.assert_close(linear_scores(x, weight), plain_x @ plain_weight.T, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(weight.grad, plain_weight.grad, rtol=1e-13, atol=1e-13)


def test_scores_of_bf16_states_are_not_rounded_to_bf16() -> None:
    x, weight = leaf(4, 64, dtype=torch.bfloat16), leaf(2, 64, dtype=torch.bfloat16)
    scores = linear_scores(x, weight)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    scores.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_has_scores_in_the_place_of_logits(tied: bool) -> None:
    config = small_model(tie_word_embeddings=tied, criteria=CRITERIA)
    model = build_model(config, 3, torch.float64)
    named = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert "lm_head.weight" not in named and named["score.weight"] == 3 * config.hidden_size
    counts = count_parameters(config)
    assert counts.total == sum(named.values())
    body = {name: n for name, n in named.items() if "embed_tokens" not in name and name != "score.weight"}
    assert counts.non_vocabulary_total == sum(body.values())
    ids = torch.arange(12).view(2, 6)
    scores = model(ids)
    assert scores.shape == (2, 6, 3)
    states, _ = model.hidden_states(ids)
    torch.testing.assert_close(scores, states @ model.score.weight.T, rtol=1e-13, atol=1e-13)
    assert flops_per_token(config, 6).head == 2 * 3 * config.hidden_size


def test_the_rest_of_it_begins_as_the_language_model() -> None:
    """Values are drawn by name, so another head changes nothing else."""
    config = small_model()
    language = dict(build_model(config, 3).named_parameters())
    scored = dict(build_model(config.model_copy(update={"criteria": CRITERIA}), 3).named_parameters())
    assert scored.keys() - language.keys() == {"score.weight"} and language.keys() - scored.keys() == {"lm_head.weight"}
    assert all(torch.equal(scored[name], language[name]) for name in scored.keys() & language.keys())
    assert 0 < float(scored["score.weight"].std()) < 2 * config.initializer_range


def test_only_the_last_stage_scores() -> None:
    config: ModelConfig = small_model(criteria=CRITERIA, tie_word_embeddings=True)
    with torch.device("meta"):
        first, last = DecoderLM(config, layers=[0]), DecoderLM(config, layers=[1])
    assert not hasattr(first, "score") and hasattr(last, "score") and not hasattr(last.model, "embed_tokens")
