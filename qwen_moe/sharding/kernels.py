"""Chooses a run's kernel provider."""

import torch

from parallel.kernels.interface import Kernels
from parallel.kernels.quantizer import Recipe
from parallel.kernels.torch_fp8 import TorchFp8
from parallel.kernels.transformer_engine import KernelsUnavailable, TransformerEngineKernels
from parallel.mesh import Grids
from qwen_moe.config import Fp8Config, RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.ops.grouped_matmul import grouped_mm


def fp8_recipe(config: Fp8Config) -> Recipe:
    """The FP8 recipe that `precision.fp8` describes."""
    return Recipe(
        name=config.recipe,
        hybrid=config.hybrid,
        history_length=config.amax_history_len,
        most_recent=config.amax_compute_algo == "most_recent",
        margin=config.margin,
    )


def choose_kernels(config: RunConfig, grids: Grids) -> Kernels:
    """The provider that `precision.kernels` names, for this rank's layers. Raises UserError if it is not available."""
    precision = config.precision
    recipe = fp8_recipe(precision.fp8) if precision.compute == "fp8" else None
    missing = ""
    if precision.kernels == "te" or (precision.kernels == "auto" and recipe is not None and torch.cuda.is_available()):
        try:
            return _transformer_engine(config, grids, recipe)
        except KernelsUnavailable as error:
            if precision.kernels == "te":
                raise UserError(f"precision.kernels te: {error}") from None
            missing = f" ({error})"
    if recipe is None:
        return Kernels(grids.tp)
    kernels = TorchFp8(grids.tp, grids.stage, recipe, keep_weights=_keeps_weights(config), grouped_mm=grouped_mm)
    kernels.name += missing
    return kernels


def _keeps_weights(config: RunConfig) -> bool:
    return config.parallel.sharding == "zero2"


def _transformer_engine(config: RunConfig, grids: Grids, recipe: Recipe | None) -> TransformerEngineKernels:
    if config.precision.compute not in ("bf16", "fp8"):
        raise KernelsUnavailable(
            f"Transformer Engine computes in bf16 or FP8, but precision.compute is {config.precision.compute}"
        )
    if config.parallel.backward_in_halves:
        raise KernelsUnavailable(
            f"parallel.schedule {config.parallel.schedule} runs backward in two halves, and Transformer Engine's layers "
            "free in the first what the second needs: use schedule 1f1b or interleaved_1f1b, or precision.kernels=torch"
        )
    if recipe is not None and recipe.name == "delayed" and config.parallel.ep_overlap:
        raise KernelsUnavailable(
            "Transformer Engine's delayed scaling was not tested with parallel.ep_overlap, which uses each layer twice in a "
            "forward: use precision.fp8.recipe current or blockwise, or leave ep_overlap out"
        )
    kernels = TransformerEngineKernels(
        grids.tp,
        grids.stage,
        recipe,
        keep_weights=_keeps_weights(config),
        recompute=config.training.recompute != "none",
    )
    # Other layers are checked when they are built; expert sizes are already known here.
    if config.model.is_moe_family:
        hidden, inner = config.model.hidden_size, config.model.moe_intermediate_size // grids.etp.size
        kernels.check_sizes("mlp.experts.down_proj", hidden, inner)
    return kernels
