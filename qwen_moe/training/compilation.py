"""Decides whether a run compiles its elementwise chains."""

import torch

from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.flops import training_flops
from qwen_moe.models.ops.compiled import compile_kernels, missing_compiler, try_compiler

# FLOPs of a whole run on CPUs, about two minutes on two cores. Not per process, so that the layout does not decide.
_FLOPS_WORTH_COMPILING = 1e13


def choose_compilation(config: RunConfig, device: torch.device) -> str:
    """Switch compilation of elementwise chains on or off, as `precision.compile` says, before a model is built. Returns a
    sentence about the choice. Raises UserError if compilation is required and cannot work."""
    choice, precision = config.precision.compile, config.precision.compute
    compile_kernels(False)
    if choice == "never" or precision == "fp64":
        return "elementwise chains are not compiled"
    if choice == "auto" and device.type == "cpu" and training_flops(config) < _FLOPS_WORTH_COMPILING:
        return "elementwise chains are not compiled: the run is short"
    problem = missing_compiler(device.type)
    problem = f"there is no {problem}" if problem else try_compiler(device)
    if problem is None:
        compile_kernels(True)
        return "elementwise chains are compiled by torch.compile"
    if choice == "always":
        raise UserError(f"precision.compile is always, but {problem}; or set it to auto or never")
    return f"elementwise chains are not compiled, training is slower: {problem}"
