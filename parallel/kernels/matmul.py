"""FP8 matmuls on any device: torch's FP8 kernel where it is exact, else matmuls of the values in bfloat16 or float32.

A product of two FP8 values is exact in float32. Every path accumulates in float32 and rounds the result once.
Shapes: ``a [M, K]`` and ``b [N, K]`` are contracted over K; rows of E experts follow each other.
"""

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from parallel.gemm import widens
from parallel.kernels.formats import E5M2, Quantized, widen

MULTIPLE = 16  # the kernel wants K and N to be multiples of this; M is free (observed on an H100)


def _has_kernel(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether to multiply these, with one scale per tensor, by `torch._scaled_mm`, of which one operand must be E4M3.

    Not on CPUs: where oneDNN has no FP8 code for a processor, it multiplies element by element, a thousand times slower. A
    run on shapes alone stands for a GPU.
    """
    if isinstance(a, FakeTensor):
        return not a.dtype == b.dtype == E5M2
    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) < (8, 9):
        return False
    return not a.dtype == b.dtype == E5M2


def _padded(x: torch.Tensor, rows: bool) -> torch.Tensor:
    """Pad the columns of ``x [R, C]`` (and with ``rows`` its rows) with zeros to a multiple. Zeros do not change a matmul.
    The result is contiguous, because GPU kernels exist for that stride order only."""
    below, right = -x.shape[0] % MULTIPLE if rows else 0, -x.shape[1] % MULTIPLE
    if below or right:
        x = F.pad(x.view(torch.uint8), (0, right, 0, below)).view(x.dtype)
    return x.contiguous()


def _scalar(inverse: torch.Tensor) -> torch.Tensor:
    """A tensor's single factor, aligned to 16 bytes. cuBLASLt rejects an unaligned one (for example an element of a stack)
    with CUBLAS_STATUS_NOT_SUPPORTED."""
    scalar = inverse.reshape(())
    return scalar.clone() if scalar.device.type == "cuda" and scalar.data_ptr() % 16 else scalar


def mm(a: Quantized, b: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """``a b^T [M, N]``."""
    if a.exact_in_bf16 and b.exact_in_bf16:
        return (_values(a, dtype) @ _values(b, dtype).T).to(dtype)
    columns = b.data.shape[0]
    if not a.data.shape[0]:
        return a.data.new_empty(0, columns, dtype=dtype)
    if _has_kernel(a.data, b.data):
        left, right = _padded(a.data, rows=False), _padded(b.data, rows=True)
        out = torch._scaled_mm(left, right.T, _scalar(a.inverse), _scalar(b.inverse), out_dtype=dtype)
        return out[:, :columns]
    sums = widen(a.data, torch.float32) @ widen(b.data, torch.float32).T
    return (sums * (a.inverse * b.inverse).reshape(())).to(dtype)


def _values(x: Quantized, dtype: torch.dtype) -> torch.Tensor:
    return x.values(torch.float32 if dtype != torch.bfloat16 or widens(x.data, dtype) else torch.bfloat16)


def transposed(x: Quantized) -> Quantized:
    block = None if x.block is None else (x.block[1], x.block[0])
    inverse = x.inverse.mT if x.inverse.ndim > 1 else x.inverse
    return Quantized(x.data.mT, inverse, block)


def sizes_of(counts: torch.Tensor, rows: int) -> list[int]:
    """Rows of each expert as integers. A shape-only run has no values and gets balanced counts."""
    if isinstance(counts, FakeTensor):
        experts = counts.shape[0]
        return [rows // experts + (i < rows % experts) for i in range(experts)]
    return counts.tolist()


def expert(x: Quantized, index: int) -> Quantized:
    """Matrix ``index`` of a stack ``[E, R, C]``, with its factors."""
    return Quantized(x.data[index], x.inverse[index], x.block)
