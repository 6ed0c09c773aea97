"""FP8 by the book, in float64: every representable value listed, the nearest one taken, scales by the recipes' formulas.

Nothing here uses torch's FP8 dtypes or the code under test.
"""

import math

import torch

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def grid(name: str) -> torch.Tensor:
    """Every finite value of the format that is not negative, ascending (arXiv 2209.05433, table 1)."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if name == "e4m3" else (5, 2, 15)
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            if exponent == 0:
                value = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
            else:
                value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
            if value <= LARGEST[name]:
                values.append(value)
    return torch.tensor(sorted(values), dtype=torch.float64)


def nearest(x: torch.Tensor, name: str) -> torch.Tensor:
    """Round to the nearest value of the format, ties to the even mantissa, saturating."""
    points = grid(name)
    magnitude = x.abs().clamp(max=LARGEST[name])
    above = torch.searchsorted(points, magnitude).clamp(max=len(points) - 1)
    below = (above - 1).clamp(min=0)
    up, down = points[above] - magnitude, magnitude - points[below]
    even = torch.where(above % 2 == 0, above, below)  # the last mantissa bit alternates along the grid
    index = torch.where(up < down, above, torch.where(down < up, below, even))
    return points[index] * x.sign()


def tensor_scale(amax: float, name: str) -> float:
    """float32(largest / amax), as TE; 1 for 0."""
    return float(torch.tensor(LARGEST[name], dtype=torch.float32) / torch.tensor(amax)) if amax else 1.0


def block_scale(amax: float, name: str) -> float:
    """The largest power of two that keeps amax representable (TE Float8BlockScaling)."""
    return 2.0 ** math.floor(math.log2(LARGEST[name] / amax)) if amax else 1.0


def mx_scale(amax: float, name: str) -> float:
    """2^-ceil(log2(amax / largest)) (TE MXFP8BlockScaling, arXiv 2506.08027)."""
    return 2.0 ** -math.ceil(math.log2(amax / LARGEST[name])) if amax else 2.0**127


def rounded(x: torch.Tensor, recipe: str, name: str, block: tuple[int, int]) -> torch.Tensor:
    """``x [R, C]`` through FP8 and back, block by block in a plain loop; per tensor for current."""
    x = x.double()
    if recipe == "current":
        scale = tensor_scale(float(x.abs().max()), name)
        return nearest((x.float() * scale).double(), name) / scale
    out = torch.empty_like(x)
    choose = block_scale if recipe == "blockwise" else mx_scale
    for top in range(0, x.shape[0], block[0]):
        for left in range(0, x.shape[1], block[1]):
            part = x[top : top + block[0], left : left + block[1]]
            scale = choose(float(part.abs().max()), name)
            out[top : top + block[0], left : left + block[1]] = nearest(part * scale, name) / scale
    return out
