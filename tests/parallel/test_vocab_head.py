"""Log-probabilities over a split vocabulary against one process, with a gradient for every token."""

import pytest
import torch

from parallel.mesh import Grids, Layout
from parallel.vocab_head import vocab_parallel_log_probs
from tests.distributed import run_distributed

VOCAB, HIDDEN, BATCH, SEQUENCE = 14, 6, 2, 8


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head weight, labels (some negative) and upstream gradients of whole sequences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator)
    labels[0, 3] = labels[1, 0] = -100
    return x, weight, labels, torch.randn(BATCH, SEQUENCE, generator=generator, dtype=torch.float64)


def _on_rank(chunk_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's log-probabilities, and the gradients of its part of the sequence and of its rows of the head."""
    n = torch.distributed.get_world_size()
    axis = Grids(Layout(tp=n), "cpu").tp
    x, weight, labels, upstream = _inputs()
    part = x.chunk(n, dim=1)[axis.index].contiguous().requires_grad_()
    rows = weight.chunk(n)[axis.index].contiguous().requires_grad_()
    first = axis.index * (VOCAB // n)
    found = vocab_parallel_log_probs(part, rows, labels, chunk_tokens, first=first, axis=axis)
    found.backward(upstream.chunk(n, dim=1)[axis.index])
    assert part.grad is not None and rows.grad is not None
    return found.detach(), part.grad, rows.grad


@pytest.mark.parametrize("chunk_tokens", [6, 1024])
def test_they_are_those_of_one_process(chunk_tokens: int) -> None:
    x, weight, labels, upstream = _inputs()
    x.requires_grad_()
    weight.requires_grad_()
    every = torch.log_softmax(x @ weight.T, -1)
    expected = every.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (labels >= 0)
    expected.backward(upstream)
    log_probs, dx, dweight = zip(*run_distributed(_on_rank, 2, chunk_tokens), strict=True)
    for got, want in (
        (torch.cat(log_probs, 1), expected),
        (torch.cat(dx, 1), x.grad),
        (torch.cat(dweight), weight.grad),
    ):
        assert want is not None
        torch.testing.assert_close(got, want.detach(), rtol=1e-11, atol=1e-12)
