"""Forward and backward of FP8 layers against float64: equal to matmuls of operands rounded by the book, and within the
bound that the formats' rounding gives against matmuls that are not rounded."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.kernels import matmul
from parallel.kernels.formats import E4M3, Quantized
from tests.parallel.kernels.providers import HYBRID, RECIPES, experts_through, linear_through, provider
from tests.parallel.kernels.reference import rounded

# Shapes that are no multiple of 16, 32 or 128.
N, A, O = 150, 200, 72  # noqa: E741


def operands(outliers: bool = False) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """x, w and dy; with ``outliers``, features of all three in which neighbours differ so much that a block across them
    loses the small one's bits: a block along the wrong dim shows in the matmul of that feature."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(N, A, generator=generator), torch.randn(O, A, generator=generator) * 0.05
    dy = torch.randn(N, O, generator=generator) * 1e-4
    if outliers:
        x[:, [5, 77]] *= 1000
        w[:, ::2] *= 1e-5
        dy[:, ::2] *= 1e-5
    linear = nn.Linear(A, O, bias=False).bfloat16()
    linear.weight.data = w.bfloat16()
    return x.bfloat16(), linear, dy.bfloat16()


def by_the_book(recipe: str, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three matmuls with every operand rounded along the contraction. ``delayed`` with a history of this very
    tensor scales as ``current``."""
    kind = "current" if recipe == "delayed" else recipe
    gradient = "e5m2" if HYBRID[recipe] else "e4m3"
    along, across = {"blockwise": ((1, 128), (128, 1)), "mxfp8": ((1, 32), (32, 1))}.get(kind, ((1, 1), (1, 1)))
    for_y, for_dx = ((128, 128), (128, 128)) if kind == "blockwise" else (along, across)
    return {
        "y": rounded(x, kind, "e4m3", along) @ rounded(w, kind, "e4m3", for_y).T,
        "dx": rounded(dy, kind, gradient, along) @ rounded(w, kind, "e4m3", for_dx),
        "dw": rounded(dy, kind, gradient, across).T @ rounded(x, kind, "e4m3", across),
    }


def exact(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each matmul, and the sum of its terms' magnitudes."""
    x, w, dy = x.double(), w.double(), dy.double()
    pairs = {"y": (x, w.T), "dx": (dy, w), "dw": (dy.T, x)}
    return {name: (a @ b, a.abs() @ b.abs()) for name, (a, b) in pairs.items()}


def close(found: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> bool:
    """Equal up to one rounding to bfloat16 (8 bits, so 2^-8 of a result at most, and no other rounding of it) and float32
    accumulation (K <= 256 terms of 2^-24)."""
    bound = 2.0**-8 * expected.abs() + 256 * 2.0**-24 * magnitude
    return bool(((found.double() - expected).abs() <= bound * (1 + 2.0**-8)).all())


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_is_the_product_of_operands_rounded_by_the_book(recipe: str, outliers: bool) -> None:
    x, linear, dy = operands(outliers)
    found = linear_through(provider(recipe), x, linear, dy)
    book = by_the_book(recipe, x, linear.weight.data, dy)
    for name, (_, magnitude) in exact(x, linear.weight.data, dy).items():
        assert close(found[name], book[name], 2 * magnitude), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_are_products_of_each_expert_alone(recipe: str) -> None:
    """Rows of one expert share no scale with another's, whatever their number; an expert may have none."""
    generator = torch.Generator().manual_seed(4)
    counts = torch.tensor([37, 0, 64, 1, 48])
    weight = (torch.randn(5, O, A, generator=generator) * torch.tensor([0.01, 1, 1, 10, 0.1]).view(-1, 1, 1)).bfloat16()
    x = torch.randn(N, A, generator=generator)
    x[37:101] *= 1000  # the third expert's
    x, dy = x.bfloat16(), (torch.randn(N, O, generator=generator) * 1e-4).bfloat16()
    found = experts_through(provider(recipe), x, weight, counts, dy)
    start = 0
    for e, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert not found["dw"][e].any()
            continue
        book = by_the_book(recipe, x[rows], weight[e], dy[rows])
        for name, (_, magnitude) in exact(x[rows], weight[e], dy[rows]).items():
            part = found[name][e] if name == "dw" else found[name][rows]
            assert close(part, book[name], 2 * magnitude), (e, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_error_against_no_rounding_is_within_the_formats_bound(recipe: str) -> None:
    """A normal value of E4M3 is off by at most u = 2^-4 of itself, of E5M2 2^-3; one below the smallest normal by at most
    half the smallest step, 2^-10 (2^-17) after scaling. So |sum a b - sum a' b'| <= sum |a||b| (ua + ub + ua ub) plus the
    terms of subnormals: t_a |b| + t_b |a| + t_a t_b, where t is that half step over the scale."""
    x, linear, dy = operands()
    w = linear.weight.data
    found = linear_through(provider(recipe), x, linear, dy)
    unit = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}
    # A scale brings the largest value of its block to more than half of the format's largest (a power of two), and
    # blocks are at most the tensor: half a smallest step over the scale is at most this share of the largest value.
    tiny = {"e4m3": 2.0**-10 / 224, "e5m2": 2.0**-17 / 28672}
    gradient = "e5m2" if HYBRID[recipe] else "e4m3"
    formats = {"y": ("e4m3", "e4m3"), "dx": (gradient, "e4m3"), "dw": (gradient, "e4m3")}
    factors = {"y": (x, w.T), "dx": (dy, w), "dw": (dy.T, x)}
    for name, (value, magnitude) in exact(x, w, dy).items():
        (fa, fb), (a, b) = formats[name], factors[name]
        ua, ub = unit[fa], unit[fb]
        ta, tb = tiny[fa] * float(a.abs().max()), tiny[fb] * float(b.abs().max())
        a, b = a.double().abs(), b.double().abs()
        bound = magnitude * (ua + ub + ua * ub) + a.shape[1] * ta * tb
        bound += (1 + ub) * ta * b.sum(0, keepdim=True) + (1 + ua) * tb * a.sum(1, keepdim=True)
        error = (found[name].double() - value).abs()
        assert (error <= bound + 2.0**-8 * value.abs()).all(), name
        # Errors are independent: their sum grows with the square root. Far below the bound, and not zero.
        relative = float((found[name].double() - value).norm() / value.norm())
        assert 0.01 < relative < (ua**2 + ub**2) ** 0.5, (name, relative)


def test_blocks_keep_small_values_beside_outliers() -> None:
    """Two features 1000 times the rest, which spread over two decades: with one scale for a tensor the small ones lose
    their bits; in blocks, only what shares a block with an outlier. Seen in the weights' gradient of ordinary features,
    as the mean of every feature's relative error."""
    x, linear, dy = operands(outliers=True)
    ordinary = [i for i in range(A) if i not in (5, 77)]
    x[:, ordinary] *= torch.logspace(-2, 0, len(ordinary)).bfloat16()
    value = exact(x, linear.weight.data, dy)["dw"][0][:, ordinary]
    error = {}
    for recipe in RECIPES:
        # One format for all, so that only scales differ.
        kernels = provider(recipe, hybrid=False)
        found = linear_through(kernels, x, linear, dy)["dw"].double()[:, ordinary]
        error[recipe] = float(((found - value).norm(dim=0) / value.norm(dim=0)).mean())
    for block in ("blockwise", "mxfp8"):
        for tensor in ("delayed", "current"):
            assert error[block] < 0.5 * error[tensor], error


@pytest.mark.parametrize("recipe", RECIPES)
def test_bias_and_row_parallel_layer(recipe: str) -> None:
    x, _, dy = operands()
    parent = nn.Module()
    parent.down = nn.Linear(A, O)
    kernels = provider(recipe)
    linear = parent.down
    kernels.row("block", parent, "down")
    kernels.materialize(torch.device("cpu"))
    parent = parent.bfloat16()
    kernels.begin_step()
    y = parent.down(x)
    y.backward(dy)
    kernels.end_step()
    assert y.shape == (N, O) and parent.down.bias.grad is not None
    torch.testing.assert_close(parent.down.bias.grad.double(), dy.double().sum(0), rtol=1e-2, atol=1e-5)
    plain = x.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
    assert float((y.detach().double() - plain).norm() / plain.norm()) < 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rows_at_all(recipe: str) -> None:
    """A rank may receive no token for any of its experts."""
    weight = torch.randn(2, O, A).bfloat16()
    found = experts_through(
        provider(recipe), torch.empty(0, A).bfloat16(), weight, torch.tensor([0, 0]), torch.empty(0, O).bfloat16()
    )
    assert found["y"].shape == (0, O) and found["dx"].shape == (0, A) and not found["dw"].any()


def test_sizes_that_a_gpu_has_no_kernel_for_are_padded_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU wants K and N to be multiples of 16; the matmul is the same. Computed by the CPU's slow kernel of that name."""
    try:
        torch._scaled_mm(*[torch.ones(16, 16).to(E4M3)] * 2, *[torch.tensor(1.0)] * 2, out_dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"this processor has no torch._scaled_mm: {error}")
    generator = torch.Generator().manual_seed(5)
    for rows, columns, inner in ((526, 40, 72), (1, 7, 3), (16, 32, 48)):
        a, b = (
            Quantized(torch.randn(n, inner, generator=generator).to(E4M3), torch.tensor(0.5)) for n in (rows, columns)
        )
        expected = matmul.mm(a, b, torch.float32)
        torch.testing.assert_close(expected, a.data.float() @ b.data.float().T / 4)
        assert all(size % 16 == 0 for size in matmul._padded(b.data, rows=True).shape)
        assert matmul._padded(a.data, rows=False).shape == (rows, -(-inner // 16) * 16)
        with monkeypatch.context() as patch:
            patch.setattr(matmul, "_has_kernel", lambda a, b: True)
            torch.testing.assert_close(matmul.mm(a, b, torch.float32), expected)


def test_a_run_on_shapes_alone_has_the_kernel_of_gpus() -> None:
    """The planner's memory is that of GPUs: it must not count the float32 copies that a CPU makes."""
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        a, b = (Quantized(torch.empty(rows, 40).to(E4M3), torch.tensor(0.5)) for rows in (7, 24))
        with Calls():
            assert matmul.mm(a, b, torch.bfloat16).shape == (7, 24)
    assert "_scaled_mm" in called and "mm" not in called
