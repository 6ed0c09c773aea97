"""Which provider of kernels a run has, and what of its precision decides the run's trajectory."""

from typing import Any

from parallel.kernels.interface import Kernels
from parallel.mesh import Grids
from qwen_moe.config import RunConfig


def choose_kernels(config: RunConfig, grids: Grids) -> Kernels:
    """The provider that `precision.kernels` names, for this rank's layers."""
    precision = config.precision
    if precision.compute != "fp8":
        return Kernels(grids.tp)
    raise NotImplementedError


def precision_settings(config: RunConfig) -> dict[str, Any]:
    """Settings of precision that decide a trajectory. ``kernels`` does not: another machine may have another provider of
    the same recipe. Runs without FP8 have no such settings, and neither have those saved before it existed."""
    precision = config.precision.model_dump(mode="json", exclude={"kernels", "fp8"})
    if config.precision.compute == "fp8":
        precision["fp8"] = config.precision.fp8.model_dump(mode="json")
    return precision
