"""FP8 tensors: scales from amax, quantization and dequantization. Shapes: R rows, C columns, any leading dims.

E4M3 and E5M2 are defined in arXiv 2209.05433; torch rounds to nearest, ties to even. Values beyond the largest saturate
(as TE's casts do); NaN stays NaN.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Quantized:
    """``data [..., R, C]`` in FP8, and the factors ``inverse`` that turn it back into values. With ``block`` (rows, columns)
    there is one factor per block: ``[..., ceil(R / rows), ceil(C / columns)]``. Without, ``inverse`` broadcasts."""

    data: torch.Tensor
    inverse: torch.Tensor
    block: tuple[int, int] | None = None

    @property
    def exact_in_bf16(self) -> bool:
        """Block factors are powers of two, so a value keeps FP8's 4 or fewer significant bits; only its exponent changes."""
        return self.block is not None

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The values ``[..., R, C]``: exact in float32, and in bfloat16 too where `exact_in_bf16`."""
        data = widen(self.data, dtype)
        if self.block is None:
            return data * self.inverse.to(dtype)
        rows, columns = data.shape[-2:]
        grid = blocks(data, self.block)
        grid = grid * self.inverse.to(dtype)[..., :, None, :, None]
        return grid.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]


@cache
def _table(fp8: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(fp8).to(dtype)


def widen(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP8 values in ``dtype``. The CPU path uses a table: torch's conversion of E4M3 to bfloat16 measured 4 times slower."""
    if data.device.type != "cpu" or type(data) is not torch.Tensor:
        return data.to(dtype)
    return torch.take(_table(data.dtype, dtype), data.view(torch.uint8).long())


def blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Pad ``[..., R, C]`` with zeros to whole blocks and view it as ``[..., R / rows, rows, C / columns, columns]``."""
    rows, columns = block
    right, below = -x.shape[-1] % columns, -x.shape[-2] % rows
    if right or below:
        if x.element_size() == 1:
            x = F.pad(x.view(torch.uint8), (0, right, 0, below)).view(x.dtype)
        else:
            x = F.pad(x, (0, right, 0, below))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def scale_of(amax: torch.Tensor, fp8: torch.dtype, power_of_two: bool) -> torch.Tensor:
    """The float32 factor that scales ``amax`` to the largest value of ``fp8``, as in TE's `compute_scale_from_amax`: 1 for
    an amax of 0 or infinity, and at most the largest float32. ``power_of_two`` rounds it down to a power of two."""
    # Not `number / tensor`: torch computes that with a reciprocal, which rounds twice.
    scale = torch.div(torch.full_like(amax, LARGEST[fp8]), amax).clamp(max=FP32_MAX)
    scale = torch.where((amax == 0) | amax.isinf(), 1.0, scale)
    if power_of_two:  # drop the mantissa; NaN would become infinity
        truncated = (scale.view(torch.int32) & -0x800000).view(torch.float32)
        scale = torch.where(scale.isnan(), scale, truncated)
    return scale


def e8m0_scale_of(amax: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    """The power of two that MXFP8 multiplies a block by: 2^-e with e = ceil(log2(amax / largest)). 2^e is stored as E8M0.

    OCP MX 1.0 leaves the rounding of e open and suggests floor(log2(amax)) minus the format's largest exponent, which
    clips the largest values of a block. TE and arXiv 2506.08027 round up, so that nothing is clipped.
    """
    bits = (amax * (1.0 / LARGEST[fp8])).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent < 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    power = 127 - (exponent + up.to(torch.int32))  # of the scale
    # 2^127 is float32's largest power of two, and 2^-127 is the smallest E8M0 factor (a float32 subnormal).
    scale = torch.ldexp(torch.ones_like(amax), power.clamp(-127, 127))
    return torch.where(amax.isnan(), amax, scale)


def cast(scaled: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    """Round float32 to FP8, saturating."""
    return scaled.clamp(-LARGEST[fp8], LARGEST[fp8]).to(fp8)


def quantize_blocks(x: torch.Tensor, fp8: torch.dtype, block: tuple[int, int], e8m0: bool) -> Quantized:
    """Quantize ``x [..., R, C]`` with one power-of-two factor per block of (rows, columns), from the block's amax."""
    grid = blocks(x.float(), block)
    amax = grid.abs().amax((-3, -1)) if grid.numel() else grid.new_zeros(*grid.shape[:-3], grid.shape[-2])
    scale = e8m0_scale_of(amax, fp8) if e8m0 else scale_of(amax, fp8, power_of_two=True)
    data = cast(grid * scale[..., :, None, :, None], fp8).flatten(-4, -3).flatten(-2, -1)
    return Quantized(data[..., : x.shape[-2], : x.shape[-1]], scale.reciprocal(), block)


def quantize_by(x: torch.Tensor, fp8: torch.dtype, scale: torch.Tensor) -> Quantized:
    """Quantize ``x`` times ``scale``, which broadcasts over it."""
    return Quantized(cast(x.float() * scale, fp8), scale.reciprocal())
