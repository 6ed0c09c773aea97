"""Rounding and scales against float64 arithmetic from the formats' definitions."""

import pytest
import torch

from parallel.kernels.formats import E4M3, E5M2, cast, e8m0_scale_of, quantize_blocks, scale_of, widen
from parallel.kernels.padding import Padding
from tests.parallel.kernels.reference import block_scale, grid, mx_scale, nearest, rounded, tensor_scale

NAMES = {E4M3: "e4m3", E5M2: "e5m2"}


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_rounding_is_to_nearest_even_and_saturates(fp8: torch.dtype) -> None:
    points = grid(NAMES[fp8])
    middles = (points[1:] + points[:-1]) / 2  # every tie
    x = torch.cat([points, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), points[-1:] * 3])
    x = torch.cat([x, -x]).float()
    assert torch.equal(cast(x, fp8).double(), nearest(x.double(), NAMES[fp8]))
    assert cast(torch.tensor([float("nan")]), fp8).float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_widening_gives_every_value_exactly(fp8: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(fp8)
    torch.testing.assert_close(widen(every, dtype).double(), every.double(), rtol=0, atol=0, equal_nan=True)


def test_scales_are_those_of_the_recipes() -> None:
    generator = torch.Generator().manual_seed(0)
    amax = torch.rand(2000, generator=generator) * 2.0 ** torch.randint(-60, 60, (2000,), generator=generator)
    amax = torch.cat([amax, 448 * 2.0 ** torch.arange(-20.0, 20), torch.tensor([0.0])])
    for fp8, name in NAMES.items():
        assert scale_of(amax, fp8, False).tolist() == [tensor_scale(float(a), name) for a in amax]
        assert scale_of(amax, fp8, True).tolist() == [block_scale(float(a), name) for a in amax]
        assert e8m0_scale_of(amax, fp8).tolist() == [mx_scale(float(a), name) for a in amax]


def test_extreme_scales_are_finite_and_nan_is_not_hidden() -> None:
    amax = torch.tensor([1e-45, 1e-38, float("inf"), 3e38])
    for scale in (scale_of(amax, E4M3, False), scale_of(amax, E4M3, True), e8m0_scale_of(amax, E4M3)):
        assert scale.isfinite().all() and (scale > 0).all()
    nan = torch.full((32, 32), float("nan"))
    for e8m0 in (False, True):
        assert quantize_blocks(nan, E4M3, (1, 32), e8m0).values(torch.float32).isnan().all()


@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128), (1, 32), (32, 1)])
@pytest.mark.parametrize("shape", [(128, 256), (70, 200), (1, 5)])
def test_blocks_of_any_shape_equal_a_plain_loop(shape: tuple[int, int], block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.logspace(-6, 3, shape[1])
    recipe = "mxfp8" if 32 in block else "blockwise"
    found = quantize_blocks(x.bfloat16(), E4M3, block, e8m0=recipe == "mxfp8")
    expected = rounded(x.bfloat16(), recipe, "e4m3", block)
    assert torch.equal(found.values(torch.float32).double(), expected)
    assert torch.equal(found.values(torch.bfloat16).double(), expected), "exact in bf16 too"


def test_padding_puts_zeros_between_experts_only() -> None:
    sizes = [3, 0, 4, 1]
    rows = torch.arange(1.0, 9).unsqueeze(1)
    padding = Padding(sizes, 4, rows.device)
    assert padding.add(rows).flatten().tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 8, 0, 0, 0]
    assert torch.equal(padding.remove(padding.add(rows)), rows)
    assert not Padding([4, 0, 8], 4, rows.device).needed
