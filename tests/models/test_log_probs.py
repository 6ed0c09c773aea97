"""Log-probabilities in chunks against torch's own, with a gradient for every token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import gemm
from qwen_moe.models.head.cross_entropy import linear_cross_entropy
from qwen_moe.models.head.log_probs import linear_log_probs


def plain(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    every = torch.log_softmax(x @ weight.T, -1)
    return every.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (labels >= 0)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    seq=st.integers(1, 17),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_values_and_gradients_equal_torchs(batch: int, seq: int, vocab: int, chunk: int, seed: int) -> None:
    x, weight = draw(batch, seq, 6, seed=seed).requires_grad_(), draw(vocab, 6, seed=seed + 1).requires_grad_()
    labels = torch.randint(-1, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))
    upstream = draw(batch, seq, seed=seed + 2)
    found, expected = linear_log_probs(x, weight, labels, chunk), plain(x, weight, labels)
    assert found.shape == labels.shape
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(found, (x, weight), upstream)
    theirs = torch.autograd.grad(expected, (x, weight), upstream)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-12)


def test_their_sum_is_the_cross_entropy_with_its_gradients() -> None:
    x, weight = draw(2, 9, 8, seed=0).requires_grad_(), draw(11, 8, seed=1).requires_grad_()
    labels = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(3)).index_fill(
        1, torch.tensor(4), -100
    )
    loss = linear_cross_entropy(x, weight, labels, 5)
    negative = -linear_log_probs(x, weight, labels, 4).sum()
    assert abs((loss - negative).item()) < 1e-12
    for a, b in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(negative, (x, weight)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("hardware", [True, False])
def test_in_bf16_they_are_as_near_as_the_operands_allow(monkeypatch: pytest.MonkeyPatch, hardware: bool) -> None:
    if not hardware:
        monkeypatch.setattr(gemm, "has_hardware", lambda dtype: dtype in (torch.float32, torch.float64))
    x, weight = draw(40, 32, seed=0), draw(50, 32, seed=1)
    labels = torch.arange(40) % 50
    inputs = [t.bfloat16().requires_grad_() for t in (x, weight)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    found, exact = linear_log_probs(*inputs, labels, 16), plain(*exact_inputs, labels)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.15  # logits of size 20 are rounded to bf16: 1/16 each
    upstream = torch.linspace(-1, 1, 40)
    ours = torch.autograd.grad(found, inputs, upstream)
    theirs = torch.autograd.grad(exact, exact_inputs, upstream.double())
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < 0.02 * want.norm()
