"""The router's one backward, judged by autograd's own operations in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.models.ops.compiled import with_compiled_kernels
from qwen_moe.models.ops.routing import logits_of, picked_and_sums, probabilities
from tests.models.test_fused import needs_compiler, relative
from tests.models.test_layers import rand

Upstream = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def plain(
    x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, counted: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    logits = x @ weight.T
    probs, seen = logits.softmax(-1), torch.ones(x.shape[:2], dtype=x.dtype)
    if counted is not None:
        seen = counted.to(x.dtype)
    picked = probs.flatten(0, 1).gather(1, indices)
    return picked, (probs * seen.unsqueeze(2)).sum(1), (logits.exp().sum(-1).log() ** 2 * seen).sum(1)


def ours(
    x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, counted: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    return picked_and_sums(x, weight, probabilities(x, weight), indices, counted)


def values_and_gradients(function, x, weight, indices, counted, upstream: Upstream) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    outputs = function(*inputs, indices, counted)
    gradients = torch.autograd.grad(outputs, inputs, [dy.to(y.dtype) for y, dy in zip(outputs, upstream, strict=True)])
    return [*(y.detach() for y in outputs), *gradients]


def case(batch: int, seq: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Upstream]:
    x, weight = rand(batch, seq, 8), rand(experts, 8, seed=1)
    indices = rand(batch * seq, experts, seed=2).topk(top_k).indices
    return x, weight, indices, (rand(batch * seq, top_k, seed=3), rand(batch, experts, seed=4), rand(batch, seed=5))


@settings(max_examples=25)
@given(batch=st.integers(1, 3), seq=st.integers(1, 9), experts=st.integers(2, 7), pads=st.booleans(), data=st.data())
def test_values_and_gradients_equal_autograd(batch, seq, experts, pads, data) -> None:
    x, weight, indices, upstream = case(batch, seq, experts, data.draw(st.integers(1, experts)))
    counted = rand(batch, seq, seed=6) > 0 if pads else None
    found = values_and_gradients(ours, x, weight, indices, counted, upstream)
    wanted = values_and_gradients(plain, x, weight, indices, counted, upstream)
    for name, one, other in zip(("picked", "probs", "z", "dx", "dweight"), found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def check_bfloat16() -> None:
    x, weight, indices, upstream = case(4, 33, 16, 4)
    half = [t.bfloat16() for t in (x, weight)]
    counted = rand(4, 33, seed=6) > 0
    found = values_and_gradients(ours, *half, indices, counted, upstream)
    wanted = values_and_gradients(plain, *(t.double() for t in half), indices, counted, upstream)
    assert [t.dtype for t in found] == [torch.float32] * 3 + [torch.bfloat16] * 2
    for one, other, limit in zip(found, wanted, (1e-5, 1e-5, 1e-5, 4e-3, 4e-3), strict=True):
        assert relative(one, other) < limit


def test_bfloat16_is_computed_in_float32() -> None:
    check_bfloat16()


@needs_compiler
def test_compiled() -> None:
    with with_compiled_kernels(True):
        check_bfloat16()


def test_backward_keeps_no_copy_of_the_tokens() -> None:
    x, weight = rand(4, 32, 8).bfloat16().requires_grad_(), rand(16, 8, seed=1).bfloat16().requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours(x, weight, rand(128, 16, seed=2).topk(4).indices, None)
    of_experts, of_tokens, of_choices = 128 * 16 * 4, 128 * 4, 128 * 4 * (8 + 4)
    assert sum(kept.values()) == 2 * (x.numel() + weight.numel()) + of_experts + of_tokens + of_choices


def test_logits_of_bfloat16_are_products_in_float32() -> None:
    x, weight = rand(2, 40, 64).bfloat16(), rand(24, 64, seed=1).bfloat16()
    exact = x.double().flatten(0, 1) @ weight.double().T
    assert relative(logits_of(x, weight), exact) < 1e-6
    assert relative(logits_of(x, weight.float()), exact) < 1e-6
