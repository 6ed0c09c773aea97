"""Whether a run's chains of elementwise work are compiled."""

import torch

from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.flops import flops_per_token
from qwen_moe.models.ops.compiled import compile_kernels, missing_compiler, try_compiler

# Of a whole run on CPUs: two minutes or so on two cores. Not per process, so that no layout decides it.
_FLOPS_WORTH_COMPILING = 1e13


def choose_compilation(config: RunConfig, device: torch.device) -> str:
    """Switch compilation of elementwise chains on or off as `precision.compile` says, before a model is built. Returns what
    was chosen, for people. Raises UserError where it is asked for and cannot be."""
    wanted, precision = config.precision.compile, config.precision.compute
    compile_kernels(False)
    if wanted == "never" or precision == "fp64":
        return "elementwise chains are not compiled"
    if wanted == "auto" and device.type == "cpu":
        tokens = config.train_steps * config.tokens_per_step
        if tokens * flops_per_token(config.model, config.data.sequence_length).training < _FLOPS_WORTH_COMPILING:
            return "elementwise chains are not compiled: the run is short"
    problem = missing_compiler(device.type)
    problem = f"there is no {problem}" if problem else try_compiler(device)
    if problem is None:
        compile_kernels(True)
        return "elementwise chains are compiled by torch.compile"
    if wanted == "always":
        raise UserError(f"precision.compile is always, but {problem}; or set it to auto or never")
    return f"elementwise chains are not compiled, training is slower: {problem}"
