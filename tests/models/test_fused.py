"""What makes a CPU fast: compiled chains, attention in blocks, products of few sizes. Judged by float64, not by itself."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import gemm
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model
from qwen_moe.models.linear import project
from qwen_moe.models.ops import block_attention as blocks
from qwen_moe.models.ops.compiled import compile_kernels, missing_compiler
from qwen_moe.models.ops.grouped_matmul import _ROUNDED, _GroupedMM, _rounded
from qwen_moe.models.ops.rotate import rotate
from qwen_moe.models.ops.swiglu import swiglu, weighted_swiglu
from tests.models.grouped_loop import loop_mm
from tests.models.test_layers import rand, small_config
from tests.small import VOCAB

needs_compiler = pytest.mark.skipif(missing_compiler("cpu") is not None, reason="no C++ compiler on this machine")


@pytest.fixture
def compiled() -> Iterator[None]:
    compile_kernels(True)
    yield
    compile_kernels(False)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def attention_gradients(function, q, k, v, dy) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, C]`` in float64 with the whole square of scores written out."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bshc,bthc->bhst", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhst,bthc->bshc", scores.softmax(-1), v)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    seq=st.integers(2, 150),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 16]),
    score_bytes=st.sampled_from([1, 1 << 14, 16 << 20]),
)
def test_attention_in_blocks_equals_the_whole_square(batch, seq, groups, repeats, dim, score_bytes) -> None:
    q = 3 * rand(batch, seq, groups * repeats, dim)
    k, v, dy = (rand(batch, seq, groups, dim, seed=1), rand(batch, seq, groups, dim, seed=2), rand(*q.shape, seed=3))
    exact = attention_gradients(exact_attention, q, k, v, dy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SCORE_BYTES", score_bytes)
        found = attention_gradients(
            lambda *x: blocks.block_attention(*x, dim**-0.5), q.float(), k.float(), v.float(), dy
        )
    for name, ours, wanted in zip(("y", "dq", "dk", "dv"), found, exact, strict=True):
        # What is added up is of size one, also where the sum is small.
        assert (ours.double() - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max())), name


@settings(max_examples=25)
@given(batch=st.integers(1, 3), seq=st.integers(2, 150), groups=st.integers(1, 3), repeats=st.integers(1, 3))
def test_forward_by_torch_equals_the_blocks(batch: int, seq: int, groups: int, repeats: int) -> None:
    """Also its logsumexp, which backward in blocks reads."""
    q = 3 * rand(batch, seq, groups * repeats, 16).float()
    k, v = rand(batch, seq, groups, 16, seed=1).float(), rand(batch, seq, groups, 16, seed=2).float()
    found, wanted = blocks._forward_by_torch(q, k, v, 0.25), blocks._forward_in_blocks(q, k, v, 0.25)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).abs().max() < 1e-5 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("tiles", [True, False])
def test_attention_in_blocks_keeps_large_scores(monkeypatch: pytest.MonkeyPatch, tiles: bool) -> None:
    """Scores in the hundreds, as biases of Qwen's keys make them: in bfloat16 they would be off by a whole unit."""
    monkeypatch.setattr(blocks, "has_tiles", lambda: tiles)
    monkeypatch.setattr(blocks, "widen", lambda x: x)
    q, k, v = 30 * rand(1, 200, 4, 64), 4 * rand(1, 200, 2, 64, seed=1), rand(1, 200, 2, 64, seed=2)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    dy = rand(*q.shape, seed=3).bfloat16()
    found = attention_gradients(lambda *x: blocks.block_attention(*x, 0.125), q, k, v, dy)
    wanted = attention_gradients(exact_attention, *(x.double() for x in (q, k, v, dy)))
    for name, ours, exact in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
        assert relative(ours, exact) < 0.01, name


@pytest.mark.parametrize(("has_bf16", "tiles"), [(True, True), (True, False), (False, False)])
def test_blocks_are_for_short_sequences(
    compiled: None, monkeypatch: pytest.MonkeyPatch, has_bf16: bool, tiles: bool
) -> None:
    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: has_bf16 or dtype != torch.bfloat16)
    monkeypatch.setattr(blocks, "has_tiles", lambda: tiles)

    def pay(tokens: int, dtype: torch.dtype) -> bool:
        return blocks.blocks_pay(torch.zeros(1, tokens, 2, 8, dtype=dtype))

    assert pay(512, torch.float32) != tiles and not pay(513, torch.float32)
    # Without instructions for bfloat16 its products are those of float32.
    assert pay(512, torch.bfloat16) and pay(513, torch.bfloat16) == (has_bf16 and not tiles)
    assert not pay(1025, torch.bfloat16) and not pay(1, torch.bfloat16) and not pay(64, torch.float64)
    compile_kernels(False)
    assert not pay(64, torch.float32) and not pay(64, torch.bfloat16)


def rounded_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return _GroupedMM.apply(x, weight, counts, _ROUNDED)


@settings(max_examples=40)
@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(sum))
def test_rounded_products_equal_the_loop(counts: list[int]) -> None:
    """The rows that a product takes from its neighbour must never show: neighbours are large here."""
    x, weight = rand(sum(counts), 8), rand(len(counts), 16, 8, seed=1)
    x = x * torch.repeat_interleave(torch.tensor([1.0, 1e6] * 3)[: len(counts)], torch.tensor(counts)).unsqueeze(1)
    dy, sizes = rand(sum(counts), 16, seed=2), torch.tensor(counts)
    results = []
    for function, dtype in ((rounded_mm, torch.float32), (loop_mm, torch.float64)):
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y, upstream = function(a, w, sizes), dy.to(dtype)
        results.append((y, *torch.autograd.grad(y, (a, w), upstream)))
        assert torch.equal(upstream, dy.to(dtype)), "another reader of this gradient would see zeros"
    for expert, part in enumerate(results[0][2]):
        assert torch.allclose(
            part.double(), results[1][2][expert], rtol=1e-4, atol=1e-4 * float(x.detach().abs().max())
        )
    begin = 0
    for count in counts:
        for ours, exact in zip(results[0][:2], results[1][:2], strict=True):
            one, other = ours[begin : begin + count].double(), exact[begin : begin + count]
            assert not count or (one - other).abs().max() <= 1e-5 * other.abs().max()
        begin += count


def test_rounded_products_have_few_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(100):
        counts = torch.multinomial(torch.ones(16), 8192, replacement=True, generator=generator).bincount(minlength=16)
        sizes |= {rounded for *_, rounded in _rounded(counts.tolist())}
    assert len(sizes) < 20


def test_project_equals_separate_linears() -> None:
    linears = [torch.nn.Linear(6, size, bias=size != 3, dtype=torch.float64) for size in (4, 3, 5)]
    parameters = [p for linear in linears for p in linear.parameters()]
    x = rand(2, 3, 6).requires_grad_()
    outputs, wanted = project(x, *linears), [linear(x) for linear in linears]
    weights = [rand(*y.shape, seed=5) for y in wanted]
    ours = torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), [x, *parameters])
    exact = torch.autograd.grad(sum((y * w).sum() for y, w in zip(wanted, weights)), [x, *parameters])
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_weighted_swiglu_backward() -> None:
    inputs = rand(4, 6).requires_grad_(), rand(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(weighted_swiglu, inputs)


def gradients(model: DecoderLM, tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    loss = model.loss_sums(tokens[:, :-1], tokens[:, 1:]).cross_entropy / tokens[:, 1:].numel()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_is_as_exact_as_an_uncompiled_one(compiled: None, dtype: torch.dtype) -> None:
    """All gradients of whole models, with every expert chosen so that rounding cannot change the routing."""
    config = small_config(num_experts=4, num_experts_per_tok=4, hidden_size=32, moe_intermediate_size=16)
    unit, seeds = torch.finfo(dtype).eps, range(4)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for seed in seeds:
        tokens = torch.randint(0, VOCAB, (2, 81), generator=torch.Generator().manual_seed(seed))
        weights = {name: p.to(dtype) for name, p in build_model(config, seed).state_dict().items()}

        def run(kind: torch.dtype, compiling: bool) -> tuple[float, torch.Tensor]:
            compile_kernels(compiling)
            model = build_model(config, 0, kind)
            model.load_state_dict(weights)  # noqa: B023
            loss, found = gradients(model, tokens)  # noqa: B023
            return loss, torch.cat([found[name].double().flatten() for name in sorted(found)])

        exact_loss, exact = run(torch.float64, False)
        for compiling in (True, False):
            loss, found = run(dtype, compiling)
            assert abs(loss - exact_loss) < 4 * unit
            errors[compiling].append(relative(found, exact))
    # Rounding differs, so single models may be luckier either way; on the whole there is no more of it.
    assert sum(errors[True]) < 1.15 * sum(errors[False]), errors
    assert max(errors[True]) < (0.1 if dtype == torch.bfloat16 else 1e-5)


@needs_compiler
def test_new_numbers_of_tokens_compile_nothing(compiled: None) -> None:
    from torch._dynamo.utils import counters

    def run(rows: int) -> None:
        weighted_swiglu(rand(rows, 8).float().requires_grad_(), torch.ones(rows)).sum().backward()

    run(5)
    before = counters["stats"]["unique_graphs"]
    for rows in (6, 17, 300):
        run(rows)
    assert counters["stats"]["unique_graphs"] == before


@needs_compiler
def test_other_kinds_of_tensors_compile_nothing(compiled: None) -> None:
    """A leaf or a result, a gradient in another order of strides, two leading dims or three: one trace serves them all."""
    from torch._dynamo.utils import counters

    def run(heads: int, leaf: bool, transposed: bool) -> None:
        x = rand(2, 7, heads, 8).float().requires_grad_()
        cos, sin = rand(2, 7, 1, 4).float(), rand(2, 7, 1, 4, seed=1).float()
        # As a projection gives it: a view of rows.
        y = rotate(x if leaf else (2 * x).flatten(2).unflatten(2, (heads, 8)), cos, sin)
        dy = rand(2, heads, 7, 8).float().transpose(1, 2) if transposed else rand(*y.shape).float()
        y.backward(dy)
        g, u = rand(7 * heads, 8).float().requires_grad_(), rand(7 * heads, 8, seed=1).float()
        swiglu(g if leaf else 2 * g, u).sum().backward()
        if leaf:
            swiglu(g.unflatten(0, (7, heads)), u.unflatten(0, (7, heads))).sum().backward()

    run(3, leaf=False, transposed=False)  # sizes that differ: equal ones would be traced as one
    before = counters["stats"]["unique_graphs"]
    run(3, leaf=True, transposed=True)
    run(5, leaf=False, transposed=True)
    assert counters["stats"]["unique_graphs"] == before


def test_nothing_is_compiled_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert weighted_swiglu(rand(3, 8), rand(3)).shape == (3, 4)


NORM = """
import sys, torch
from qwen_moe.models.ops.compiled import compile_kernels
from qwen_moe.models.ops.rms_norm import rms_norm
x, weight = torch.arange(96, dtype=torch.float64).view(2, 48).cos(), torch.ones(48, dtype=torch.float64)
plain = rms_norm(x, weight, 1e-6)
compile_kernels(True)
sys.exit(int((rms_norm(x, weight, 1e-6) - plain).abs().max() > 1e-12))
"""


@needs_compiler
def test_compiled_code_of_other_instructions_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    """Code for the widest vectors here, and then for AVX2, by processes that share torch's cache."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for more in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        subprocess.run([sys.executable, "-c", NORM], env=environment | more, check=True, timeout=300)
