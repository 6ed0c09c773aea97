"""Weights that are NaN or infinite, told of by name before they are trained from, generated from or exported."""

import torch

from qwen_moe.errors import UserError


def count_not_finite(tensor: torch.Tensor) -> int:
    """Elements of ``tensor`` that are NaN or infinite; one pass over it, without a copy, when there are none."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0
    low, high = tensor.aminmax()  # NaN when anything is
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def check_finite(name: str, tensor: torch.Tensor, where: str) -> torch.Tensor:
    """``tensor`` itself. Raises UserError when it holds NaN or infinite values: nothing good can come of them."""
    if count := count_not_finite(tensor):
        raise UserError(not_finite_message(name, count, tensor.numel(), where))
    return tensor


def not_finite_message(name: str, count: int, total: int, where: str) -> str:
    return (
        f"tensor {name} of {where} holds {count:,} of {total:,} values that are NaN or infinite: the weights are damaged, "
        "or their training diverged; use an earlier checkpoint, or download them again"
    )


def check_cast(name: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """``after``, which is ``before`` (all finite) in another dtype. Raises UserError when it overflowed."""
    if before.dtype != after.dtype and (count := count_not_finite(after)):
        raise UserError(
            f"{count:,} values of tensor {name} are larger than {str(after.dtype).removeprefix('torch.')} can hold "
            f"({torch.finfo(after.dtype).max:.3g}): use a wider dtype, such as bf16 or fp32"
        )
    return after
