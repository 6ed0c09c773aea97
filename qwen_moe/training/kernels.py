"""Which provider of kernels a run has, and what of its precision decides the run's trajectory."""

from typing import Any

from parallel.kernels.interface import Kernels
from parallel.kernels.quantiser import Recipe
from parallel.kernels.torch_fp8 import TorchFp8
from parallel.mesh import Grids
from qwen_moe.config import Fp8Config, RunConfig
from qwen_moe.errors import UserError


def fp8_recipe(config: Fp8Config) -> Recipe:
    """The settings of `precision.fp8` as the recipe of products."""
    return Recipe(
        name=config.recipe,
        hybrid=config.hybrid,
        history_length=config.amax_history_len,
        most_recent=config.amax_compute_algo == "most_recent",
        margin=config.margin,
    )


def choose_kernels(config: RunConfig, grids: Grids) -> Kernels:
    """The provider that `precision.kernels` names, for this rank's layers. Raises UserError where it is not there."""
    precision = config.precision
    if precision.kernels == "te":
        raise UserError(
            "precision.kernels is te, but this version has no provider through Transformer Engine: set it to torch or auto"
        )
    if precision.compute != "fp8":
        return Kernels(grids.tp)
    keep = config.parallel.sharding == "zero2"
    return TorchFp8(grids.tp, grids.stage, fp8_recipe(precision.fp8), keep_weights=keep)


def precision_settings(config: RunConfig) -> dict[str, Any]:
    """Settings of precision that decide a trajectory. ``kernels`` does not: another machine may have another provider of
    the same recipe. Runs without FP8 have no such settings, and neither have those saved before it existed."""
    precision = config.precision.model_dump(mode="json", exclude={"kernels", "fp8"})
    if config.precision.compute == "fp8":
        precision["fp8"] = config.precision.fp8.model_dump(mode="json")
    return precision
