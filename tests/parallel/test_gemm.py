"""Half-precision products on CPUs with and without instructions for them, against float64 rounded once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel import gemm
from parallel.kernels.formats import E4M3, quantize_by, scale_of
from parallel.kernels.matmul import mm as fp8_mm
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.head.cross_entropy import linear_cross_entropy
from qwen_moe.models.linear import Linear, project
from qwen_moe.models.ops.grouped_matmul import grouped_mm
from qwen_moe.models.rope import Rope
from tests.models.test_layers import small_config

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def no_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose only fast products are float32's and float64's."""
    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: dtype not in HALF)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded_once(got: torch.Tensor, exact: torch.Tensor) -> None:
    """``got`` is float64's ``exact`` rounded to its dtype; a float32 sum may cross a boundary between two values, rarely."""
    want = exact.to(got.dtype)
    assert got.shape == want.shape
    differ = got != want
    assert differ.float().mean() < 0.02
    unit = torch.finfo(got.dtype).eps
    assert torch.all((got.double() - exact).abs() <= unit * exact.abs() + unit * unit)


def test_products_of_widened_operands_are_as_accurate_as_float32() -> None:
    """Sums in the hundreds of thousands, where bfloat16 would be off by a thousand."""
    a, b = 300 * draw(4, 32, 64, dtype=torch.bfloat16), 300 * draw(4, 64, 48, dtype=torch.bfloat16, seed=1)
    exact = a.double() @ b.double()
    found = gemm.exact_bmm(a.float(), b.float(), a.dtype)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 2e-6 * exact.abs().max()


def test_other_products_of_float32_keep_all_their_digits() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        gemm.exact_bmm(torch.ones(2, 3, 4), torch.ones(2, 5, 6), torch.bfloat16)
    a, b = draw(4, 32, 64, dtype=torch.float32), draw(4, 64, 48, dtype=torch.float32, seed=1)
    gemm.exact_bmm(a, b, torch.bfloat16)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    exact = a.double() @ b.double()
    for found in (a @ b, gemm.exact_bmm(a, b, torch.float32)):
        assert (found.double() - exact).abs().max() < 2e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_widened_linears_are_float64_rounded_with_their_gradients(
    no_hardware: None, dtype: torch.dtype, rows: int
) -> None:
    x = draw(2, rows, 48, dtype=dtype).requires_grad_()
    layers = [Linear(48, 40, bias=bias) for bias in (True, False)]
    for seed, layer in enumerate(layers):
        layer.weight = torch.nn.Parameter(draw(40, 48, dtype=dtype, seed=seed + 1))
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(draw(40, dtype=dtype, seed=9))
    outputs = project(x, *layers)
    upstream = [draw(2, rows, 40, dtype=dtype, seed=20 + i) for i in range(2)]
    torch.autograd.backward(outputs, upstream)
    wide = x.detach().double().requires_grad_()
    weights = [layer.weight.detach().double().requires_grad_() for layer in layers]
    bias = layers[0].bias.detach().double().requires_grad_()
    exact = [wide @ weights[0].T + bias, wide @ weights[1].T]
    torch.autograd.backward(exact, [u.double() for u in upstream])
    for got, want in zip(outputs, exact, strict=True):
        assert_rounded_once(got, want)
    assert x.grad is not None and wide.grad is not None and bias.grad is not None
    assert_rounded_once(x.grad, wide.grad)
    for layer, weight in zip(layers, weights, strict=True):
        assert weight.grad is not None
        assert_rounded_once(layer.weight.grad, weight.grad)
    assert_rounded_once(layers[0].bias.grad, bias.grad)
    assert torch.equal(layers[0](x), outputs[0])  # the single layer is the same product


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_products_of_few_rows_without_gradients_are_float64_rounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    """Turned around or not: the same products, also of experts."""
    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: True)
    turned, original = [], gemm.times
    monkeypatch.setattr(gemm, "times", lambda x, *rest: turned.append(len(x)) or original(x, *rest))
    x, layers = draw(1, rows, 48, dtype=dtype), [Linear(48, 200, bias=bias) for bias in (True, False)]
    for seed, layer in enumerate(layers):
        layer.weight = torch.nn.Parameter(draw(200, 48, dtype=dtype, seed=seed + 1))
    layers[0].bias = torch.nn.Parameter(draw(200, dtype=dtype, seed=9))
    with torch.no_grad():
        outputs = project(x, *layers)
        one = layers[0](x)
        experts = grouped_mm(x[0], draw(2, 200, 48, dtype=dtype, seed=4), torch.tensor([rows - rows // 2, rows // 2]))
    assert turned == ([rows] * 3 if rows <= 64 else [])
    assert torch.equal(one, outputs[0]) and one.is_contiguous()
    exact = [x.double() @ layer.weight.double().T for layer in layers]
    assert_rounded_once(outputs[0], exact[0] + layers[0].bias.double())
    assert_rounded_once(outputs[1], exact[1])
    weight = draw(2, 200, 48, dtype=dtype, seed=4).double()
    parts = x[0].double().split([rows - rows // 2, rows // 2])
    assert_rounded_once(experts, torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)]))


@pytest.mark.parametrize("dtype", HALF)
def test_widened_expert_products_are_float64_rounded_with_their_gradients(
    no_hardware: None, dtype: torch.dtype
) -> None:
    counts = torch.tensor([5, 0, 70, 1])
    x, weight = draw(76, 32, dtype=dtype).requires_grad_(), draw(4, 24, 32, dtype=dtype, seed=1).requires_grad_()
    upstream = draw(76, 24, dtype=dtype, seed=2)
    y = grouped_mm(x, weight, counts)
    y.backward(upstream)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    parts = wide.split(counts.tolist())
    exact = torch.cat([part @ wide_weight[e].T for e, part in enumerate(parts)])
    exact.backward(upstream.double())
    assert_rounded_once(y, exact)
    assert x.grad is not None and weight.grad is not None and wide.grad is not None and wide_weight.grad is not None
    assert_rounded_once(x.grad, wide.grad)
    assert_rounded_once(weight.grad, wide_weight.grad)


def test_widened_attention_and_loss_are_as_near_to_float64_as_native_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    x, labels = draw(2, 33, config.hidden_size, dtype=torch.bfloat16), torch.arange(66).view(2, 33) % 53
    weight = draw(53, config.hidden_size, dtype=torch.bfloat16, seed=3)
    state = {n: draw(*p.shape, dtype=torch.bfloat16, seed=5) for n, p in Attention(config, 0).named_parameters()}

    def run(dtype: torch.dtype) -> torch.Tensor:
        """Output, loss and all gradients, in float64."""
        module = Attention(config, 0).to(dtype)
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
        hidden, head = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        rotary = Rope(config.head_dim, 1e4).tables(torch.arange(33).unsqueeze(0), dtype)
        y = module(hidden, rotary, Visibility())
        loss = linear_cross_entropy(y, head, labels, 20) / 66
        loss.backward()
        found = [y, loss, hidden.grad, head.grad, *(p.grad for p in module.parameters())]
        return torch.cat([t.detach().double().flatten() / t.detach().double().abs().amax() for t in found])

    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: True)
    exact, native = run(torch.float64), run(torch.bfloat16)
    monkeypatch.setattr(gemm, "has_hardware", lambda dtype: dtype not in HALF)
    widened = run(torch.bfloat16)
    assert (widened - exact).norm() <= 1.05 * (native - exact).norm()
    assert not torch.equal(widened, native)  # the other path was taken


def test_widened_fp8_products_are_exact_products_rounded_once(no_hardware: None) -> None:
    a, b = (draw(33, 48, dtype=torch.float32, seed=s) for s in (1, 2))
    left, right = (quantize_by(x, E4M3, scale_of(x.abs().amax(), E4M3, power_of_two=False)) for x in (a, b))
    exact = (left.data.double() @ right.data.double().T) * (left.inverse.double() * right.inverse.double())
    assert_rounded_once(fp8_mm(left, right, torch.bfloat16), exact)


def test_widening_saves_nothing_wide_for_backward(no_hardware: None) -> None:
    saved: list[torch.dtype] = []
    layer = Linear(16, 8).to(torch.bfloat16)
    x = draw(4, 16, dtype=torch.bfloat16).requires_grad_()
    weight = draw(2, 8, 16, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):  # type: ignore[func-returns-value]
        project(x, layer)
        layer(x)
        grouped_mm(x, weight, torch.tensor([3, 1]))
    assert {dtype for dtype in saved if dtype.is_floating_point} == {torch.bfloat16}


def test_shapes_alone_and_wider_dtypes_are_never_widened(no_hardware: None) -> None:
    with FakeTensorMode():
        assert not gemm.widens(torch.empty(2, 2, dtype=torch.bfloat16))
    assert not gemm.widens(torch.empty(2, 2, dtype=torch.bfloat16, device="meta"))
    assert gemm.widens(torch.empty(2, 2, dtype=torch.bfloat16))
    for dtype in (torch.float32, torch.float64):
        x = torch.empty(2, 2, dtype=dtype)
        assert gemm.widen(x) is x


SCRIPT = """
import json, torch
from parallel import gemm
a, b = (torch.randn(96, 64, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
y, exact = gemm.linear(a, b), a.double() @ b.double().T
fp8 = torch.randint(-8, 9, (32, 32)).to(torch.float8_e4m3fn)  # small whole numbers: every sum is exact
from parallel.kernels.formats import Quantized
from parallel.kernels.matmul import mm
one = Quantized(fp8, torch.ones(()))
print(json.dumps({"hardware": gemm.has_hardware(torch.bfloat16), "said": gemm.description(torch.bfloat16),
    "differ": (y != exact.bfloat16()).float().mean().item(),
    "fp8": torch.equal(mm(one, one, torch.float32).double(), fp8.double() @ fp8.double().T)}))
"""


@pytest.mark.parametrize("instructions", ["AVX2", None])
def test_this_processor_is_read_and_what_onednn_may_use_of_it(instructions: str | None) -> None:
    """oneDNN and ATen are told to behave as on a processor with AVX2 alone; the same products come out, rounded once."""
    environment = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    if instructions is not None:
        environment |= {"ONEDNN_MAX_CPU_ISA": instructions, "ATEN_CPU_CAPABILITY": instructions.lower()}
    outcome = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert found["differ"] < 0.02 and found["fp8"]
    processor = Path("/proc/cpuinfo")
    if instructions == "AVX2":
        assert not found["hardware"] and "in float32, rounded to bfloat16" in found["said"]
    elif processor.is_file() and "flags" in (text := processor.read_text(encoding="utf-8")):
        assert found["hardware"] == ("avx512_bf16" in text or "amx_bf16" in text)
