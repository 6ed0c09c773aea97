"""Finds NaN and infinite weights, and names them before they are used for training, generation or export."""

import torch

from launchers.counted import counted
from qwen_moe.errors import UserError


def count_not_finite(tensor: torch.Tensor) -> int:
    """Number of elements of ``tensor`` that are NaN or infinite. If there are none, it takes one pass without a copy."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0
    low, high = tensor.aminmax()  # NaN if any element is NaN
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def check_finite(name: str, tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Returns ``tensor``. Raises UserError if it holds NaN or infinite values."""
    if count := count_not_finite(tensor):
        raise UserError(not_finite_message(name, count, tensor.numel(), where))
    return tensor


def not_finite_message(name: str, count: int, total: int, where: str) -> str:
    return (
        f"tensor {name} of {where} holds {count:,} of {total:,} values that are NaN or infinite: the weights are damaged, "
        "or their training diverged; use an earlier checkpoint, or download them again"
    )


def check_cast(name: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Returns ``after``, which is ``before`` (all finite) in another dtype. Raises UserError if it overflowed."""
    if before.dtype != after.dtype and (count := count_not_finite(after)):
        raise UserError(
            f"{counted(count, 'value')} of tensor {name} {'is' if count == 1 else 'are'} larger than "
            f"{str(after.dtype).removeprefix('torch.')} can hold "
            f"({torch.finfo(after.dtype).max:.3g}): use a wider dtype, such as bf16 or fp32"
        )
    return after
