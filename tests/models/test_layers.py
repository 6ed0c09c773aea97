"""Each layer against its closed form or a plain loop, and every hand-written backward against finite differences."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import qwen_moe.models.head.cross_entropy as linear_cross_entropy_file
from qwen_moe.config import ModelConfig
from qwen_moe.models.head.cross_entropy import linear_cross_entropy
from qwen_moe.models.init import build_model, initial_value
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import Router
from qwen_moe.models.norm import RMSNorm
from qwen_moe.models.ops.expert_products import down_product, up_product
from qwen_moe.models.ops.grouped_matmul import grouped_mm
from qwen_moe.models.ops.permute import Rows, combine, permute, permute_weights, sort_by_expert
from qwen_moe.models.ops.rms_norm import _RMSNorm
from qwen_moe.models.ops.swiglu import swiglu
from qwen_moe.models.rope import Rope, apply_rope, make_rope
from tests.models.grouped_loop import loop_mm
from tests.small import small_model


def small_config(**changes: Any) -> ModelConfig:
    """Weights so large that what a layer does shows."""
    return small_model(**{"initializer_range": 0.3} | changes)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Hand-written backwards


def test_rms_norm_backward() -> None:
    x, weight = rand(2, 3, 8).requires_grad_(), rand(8, seed=1).requires_grad_()
    assert gradcheck(lambda a, b: _RMSNorm.apply(a, b, 1e-3), (x, weight))


def test_rope_backward() -> None:
    rotary = Rope(6, 100.0).tables(torch.arange(5)[None], torch.float64)
    assert gradcheck(lambda x: apply_rope(x, rotary), (rand(2, 5, 3, 6).requires_grad_(),))


def test_a_loss_without_gradients_forms_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels = rand(7, 4), rand(9, 4, seed=1), torch.tensor([1, -100, 3, 8, 0, -100, 2])
    with_gradient = linear_cross_entropy(x.requires_grad_(), weight, labels, 3)
    monkeypatch.setattr(linear_cross_entropy_file, "_losses_and_gradients", lambda *_: pytest.fail("formed"))
    assert linear_cross_entropy(x.detach(), weight, labels, 3) == with_gradient
    torch.testing.assert_close(with_gradient, F.cross_entropy(x @ weight.T, labels, reduction="sum"))


def test_swiglu_backward() -> None:
    assert gradcheck(swiglu, (rand(4, 5).requires_grad_(), rand(4, 5, seed=1).requires_grad_()))


def test_dispatch_and_combine_backward() -> None:
    indices = torch.tensor([[0, 2], [2, 1], [0, 1]])
    rows, choice = sort_by_expert(indices, 3)
    assert gradcheck(lambda x: permute(x, rows), (rand(3, 4).requires_grad_(),))
    assert gradcheck(lambda x: combine(x, rows), (rand(6, 4).requires_grad_(),))
    weights = rand(3, 2, seed=1).requires_grad_()
    assert gradcheck(lambda w: permute_weights(w, choice, rows.row), (weights,))
    assert torch.equal(permute_weights(weights, choice, rows.row)[rows.row], weights)


@pytest.mark.parametrize("left_out", [0, 2])
@pytest.mark.parametrize("k", [1, 2])
def test_products_that_compute_their_input_again(k: int, left_out: int) -> None:
    """Against plain indexing, SwiGLU and a loop over experts, written out here; ``left_out``: dropped rows."""
    indices = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 2]])[:, :k]
    rows, _ = sort_by_expert(indices, 4)
    kept = indices.numel() - left_out
    counts = torch.bincount(indices.flatten().sort().values[:kept], minlength=4)
    rows = Rows(rows.token[:kept], rows.row, counts)
    x, up, down = rand(4, 6), rand(4, 10, 6, seed=1), rand(4, 6, 5, seed=2)
    weights, upstream = rand(kept, seed=3), rand(kept, 6, seed=4)

    def plain(x, up, weights, down):
        outputs = []
        for expert, part in enumerate(x[rows.token].split(counts.tolist())):
            gate, linear = (part @ up[expert].T).chunk(2, -1)
            outputs.append((gate * gate.sigmoid() * linear) @ down[expert].T)
        return torch.cat(outputs) * weights.unsqueeze(1)

    def ours(x, up, weights, down):
        return down_product(up_product(x, rows, up), weights, down, counts)

    results = []
    for function in (plain, ours):
        inputs = [t.clone().requires_grad_() for t in (x, up, weights, down)]
        y = function(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, upstream)))
    for name, wanted, found in zip(("y", "dx", "dup", "dweights", "ddown"), *results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, up, weights, down), results[0][0])


def test_experts_keep_states_and_projections_alone() -> None:
    """What backward can gather or multiply again is not kept: rows of states, SwiGLU's values, outputs of experts."""
    moe: MoE = build_model(small_config(moe_intermediate_size=12), 3, torch.float32).model.layers[0].mlp
    x = rand(2, 8, 16).float().requires_grad_()
    rows, size, width = 2 * 8 * moe.top_k, moe.experts.down_proj.shape[2], 16
    kept: set[tuple[int, ...]] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(tuple(t.shape)) or t, lambda t: t):  # type: ignore[func-returns-value]
        moe(x)
    assert (rows, 2 * size) in kept
    assert (rows, size) not in kept and (rows, width) not in kept


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_linear_cross_entropy_backward(chunk: int) -> None:
    labels = torch.tensor([1, -100, 0, 4, 2, -100, 3])
    x, weight = rand(7, 3).requires_grad_(), rand(5, 3, seed=1).requires_grad_()
    # The incoming gradient is not 1: the scale of the whole loss reaches both.
    assert gradcheck(lambda a, b: 0.37 * linear_cross_entropy(a, b, labels, chunk), (x, weight))


# Closed forms


def test_rms_norm_closed_form() -> None:
    x = rand(3, 10)
    norm = RMSNorm(10, 1e-6).double()
    norm.weight.data = rand(10, seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)


def test_rms_norm_statistics_are_float32_in_bfloat16() -> None:
    """4,096 equal values: their squares summed in bfloat16 would stop growing at 256 times one of them."""
    norm = RMSNorm(4096, 1e-6)
    norm.weight.data = torch.ones(4096)
    out = norm.bfloat16()(torch.full((1, 4096), 3.0, dtype=torch.bfloat16))
    assert torch.equal(out, torch.ones_like(out))


def test_rope_is_a_complex_rotation() -> None:
    """Dims i and i + C/2 form z_i; position p turns z_i by p * theta^(-2i/C)."""
    head_dim, theta = 8, 10_000.0
    x, positions = rand(1, 5, 2, head_dim), torch.tensor([[0, 1, 7, 100, 5000]])
    out = apply_rope(x, Rope(head_dim, theta).tables(positions, torch.float64))
    z = torch.complex(x[..., :4], x[..., 4:])
    for i in range(4):
        turn = torch.polar(torch.ones(5, dtype=torch.float64), positions[0].double() * theta ** (-2 * i / head_dim))
        expected = z[0, :, :, i] * turn[:, None]
        torch.testing.assert_close(out[0, :, :, i], expected.real, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out[0, :, :, i + 4], expected.imag, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_cross_entropy_equals_full_logits(dtype: torch.dtype) -> None:
    x, weight = rand(50, 16, dtype=dtype).requires_grad_(), rand(37, 16, seed=1, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 37, (50,), generator=torch.Generator().manual_seed(2))
    labels[::7] = -100
    loss = linear_cross_entropy(x, weight, labels, 16)
    loss.backward()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum")
    expected.backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for got, reference in zip((x, weight), wide):
        error = (got.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < tolerance


def test_linear_cross_entropy_of_nothing_is_zero() -> None:
    x, weight = rand(4, 3).requires_grad_(), rand(5, 3, seed=1).requires_grad_()
    loss = linear_cross_entropy(x, weight, torch.full((4,), -100), 2)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_does_not_change_the_rest() -> None:
    labels = torch.tensor([1, 2, 0])
    x, weight = rand(3, 4).requires_grad_(), rand(5, 4, seed=1)
    linear_cross_entropy(x, weight, labels, 2).backward()
    other = x.detach().clone().requires_grad_()
    linear_cross_entropy(other, weight.clone().requires_grad_(), labels, 2).backward()
    assert torch.equal(x.grad, other.grad)


# Experts


COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [2, 2, 2, 3]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmul_equals_the_loop(counts: list[int], dtype: torch.dtype) -> None:
    x, weight = rand(9, 16, dtype=dtype), rand(4, 24, 16, seed=1, dtype=dtype)
    outcomes = []
    for function, kind in ((grouped_mm, dtype), (loop_mm, torch.float64)):
        a, w = (t.detach().clone().to(kind).requires_grad_() for t in (x, weight))
        out = function(a, w, torch.tensor(counts))
        out.backward(rand(9, 24, seed=2).to(kind))
        outcomes.append([out, a.grad, w.grad])
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for got, expected in zip(*outcomes):
        assert (got.double() - expected).norm() <= bound * expected.norm()
    for expert, count in enumerate(counts):
        if count == 0:
            assert not outcomes[0][2][expert].any(), "an expert without tokens has a gradient"


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_sorting_by_expert_is_a_permutation_that_inverts(tokens: int, experts: int, data: Any) -> None:
    k = data.draw(st.integers(1, experts))
    rows = [data.draw(st.permutations(range(experts)))[:k] for _ in range(tokens)]
    indices = torch.tensor(rows)
    order, choices = sort_by_expert(indices, experts)
    assert order.counts.tolist() == [sum(row.count(e) for row in rows) for e in range(experts)]
    by_row = torch.repeat_interleave(torch.arange(experts), order.counts)
    for token in range(tokens):
        for choice in range(k):
            position = order.row[token, choice]
            assert by_row[position] == indices[token, choice] and order.token[position] == token
            assert choices[position] == token * k + choice


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_moe_equals_a_loop_over_tokens_and_experts(norm_topk_prob: bool) -> None:
    config = small_config(norm_topk_prob=norm_topk_prob)
    moe: MoE = build_model(config, 3, torch.float64).model.layers[0].mlp
    moe.gate.expert_bias.copy_(torch.tensor([0.0, 0.3, 0.0, -0.2, 0.0, 0.1]))
    x = rand(2, 5, 16)
    y, statistics = moe(x)
    counts = torch.zeros(2, 6, dtype=torch.int64)
    for b in range(2):
        for s in range(5):
            token = x[b, s]
            probs = (moe.gate.weight @ token).softmax(0)
            chosen = (probs + moe.gate.expert_bias).topk(2).indices
            weights = probs[chosen] / (probs[chosen].sum() if norm_topk_prob else 1.0)
            expected = torch.zeros(16, dtype=torch.float64)
            for weight, e in zip(weights, chosen):
                gate, up = moe.experts.gate_up_proj[e]
                expected += weight * (moe.experts.down_proj[e] @ (F.silu(gate @ token) * (up @ token)))
                counts[b, e] += 1
            shared = moe.shared_expert
            inner = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            opened = torch.sigmoid(moe.shared_expert_gate.weight[0] @ token)
            expected += opened * (shared.down_proj.weight @ inner)
            torch.testing.assert_close(y[b, s], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(statistics.counts, counts)


def test_router_statistics() -> None:
    router = Router(small_config()).double()
    router.weight.data = rand(6, 16, seed=4)
    x = rand(3, 7, 16)
    _, indices, statistics = router(x)
    logits = x @ router.weight.T
    torch.testing.assert_close(statistics.prob_sum, logits.softmax(-1).sum(1))
    torch.testing.assert_close(statistics.z_sum, logits.exp().sum(-1).log().square().sum(1))
    assert statistics.counts.sum() == indices.numel() and statistics.counts.dtype == torch.int64


def test_a_bfloat16_router_decides_in_float32() -> None:
    """Two experts whose logits differ by less than bfloat16 can tell apart are still told apart."""
    router = Router(small_config(num_experts_per_tok=1)).bfloat16()
    router.weight.data = torch.zeros(6, 16, dtype=torch.bfloat16)
    router.weight.data[2, :2] = torch.tensor([1.0, 0.0])
    router.weight.data[5, :2] = torch.tensor([1.0, 2.0**-9])
    x = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    x[..., :2] = 1.0
    _, indices, _ = router(x)
    assert indices.item() == 5


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    small, large = build_model(small_config(), 7), build_model(small_config(num_hidden_layers=4, num_experts=9), 7)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(small.get_parameter(name), large.get_parameter(name))
    experts = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(small.get_parameter(experts), large.get_parameter(experts)[:6])
    assert not torch.equal(small.get_parameter(name), small.get_parameter(name.replace("layers.1", "layers.0")))
    assert not torch.equal(small.get_parameter(experts)[0], small.get_parameter(experts)[1])
    assert not torch.equal(small.get_parameter(name), build_model(small_config(), 8).get_parameter(name))
    for parameter, tensor in small.named_parameters():
        if parameter.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        if parameter.endswith(".bias"):
            assert not tensor.any()
    drawn = initial_value("some.weight", (400, 500), 0, 0.02)
    assert (
        drawn.std().item() == pytest.approx(0.02, rel=0.01) and abs(drawn.mean().item()) < 0.02 / math.sqrt(200_000) * 4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (7, 4), (7, 3), (9, 16)])
def test_grouped_mm_of_shapes_that_its_kernel_refuses(rows: int, width: int, dtype: torch.dtype) -> None:
    """No rows at all (a rank whose experts nobody chose), and rows that are not a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, rows // 2, 0, rows - rows // 2])
    x = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 8, width, generator=generator).to(dtype).requires_grad_()
    y = grouped_mm(x, weight, counts)
    expected = torch.cat([part @ weight[e].T for e, part in enumerate(x.split(counts.tolist()))])
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.backward(torch.ones_like(y))
    assert weight.grad is not None and torch.isfinite(weight.grad).all()
    assert float(weight.grad[0].abs().sum()) == float(weight.grad[2].abs().sum()) == 0


@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_rotation_far_out_is_as_exact_as_its_dtype(theta: float) -> None:
    """Cosines of angles in float32 would be off by up to 0.06 at these positions."""
    positions = torch.arange(1_000_000, 1_000_064)
    cos = Rope(64, theta).tables(positions[None], torch.float32).cos[0]
    for row, position in zip(cos, positions.tolist(), strict=True):
        exact = [math.cos(position * theta ** (-2 * i / 64)) for i in range(32)]
        assert max(abs(a - b) for a, b in zip(row.tolist(), exact, strict=True)) < 1e-6


def test_yarn_of_the_published_models() -> None:
    """Qwen2.5's four-fold extension: pairs up to 23 turn often enough to stay, pairs from 40 are divided by 4."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = make_rope(small_model(head_dim=128, rope_theta=1e6, max_position_embeddings=131072, rope_scaling=scaling))
    ratio = Rope(128, 1e6).frequencies() / rope.frequencies()
    assert ratio[:24].tolist() == [1.0] * 24 and (ratio[24:40] > 1).all()
    torch.testing.assert_close(ratio[40:], torch.full((24,), 4.0, dtype=torch.float64))
    assert abs(rope.score_factor - 1.138629436**2) < 1e-8
