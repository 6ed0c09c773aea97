"""Sizes of experts that a GPU multiplies in one grouped GEMM."""

from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError

ALIGNED = 8  # features of an expert in bf16, 16 bytes
_WHY = (
    "which grouped GEMMs need (rows of 16 bytes): the experts would run one at a time, and such models cannot be planned "
    "for or traced"
)


def check_aligned(model: ModelConfig, etp: int = 1) -> None:
    """Raises UserError for experts, or slices of them with ``etp``, that a GPU would run one at a time: no estimate of a
    step is of such experts."""
    if not model.is_moe_family:
        return
    for name in ("hidden_size", "moe_intermediate_size"):
        if (size := getattr(model, name)) % ALIGNED:
            near = max(1, round(size / ALIGNED)) * ALIGNED
            raise UserError(f"model.{name} {size} is not a multiple of {ALIGNED}, {_WHY}. {near} can be")
    if (size := model.moe_intermediate_size) // etp % ALIGNED:
        raise UserError(
            f"parallel.etp {etp} cuts experts of model.moe_intermediate_size {size} into slices of {size // etp}, which is "
            f"not a multiple of {ALIGNED}, {_WHY}: lower parallel.etp"
        )
