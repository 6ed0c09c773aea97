"""Elementwise chains compiled into one kernel each by torch.compile: C++ on a CPU, Triton on a GPU.

The functions marked `fused` are written once, in plain torch, and give the same mathematics compiled or not. A process
switches compilation on for itself before it builds a model (`compile_kernels`, as `torch.set_num_threads`): training
does where `precision.compile` says so; verification in float64 and everything short does not.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_compiling = False


def compile_kernels(on: bool) -> None:
    """Whether functions marked `fused` are compiled from now on, in this process."""
    global _compiling
    _compiling = on


def compiling() -> bool:
    return _compiling


def missing_compiler(device_type: str) -> str | None:
    """What `compile_kernels` would need on this machine and does not find, or None."""
    if device_type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton, which comes with CUDA builds of torch"
    if shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++"):
        return None
    return "C++ compiler: install g++ or clang++, or name one in the variable CXX"


def try_compiler(device: torch.device) -> str | None:
    """Compile and run a first kernel on ``device``. None when it works, else why it does not, in one line."""
    x = torch.ones(2, 8, device=device)
    try:
        torch.compile(lambda x: x.sigmoid() + x, dynamic=True)(x)
    except Exception as error:  # whatever a compiler, its cache folder or a driver may raise
        return f"torch.compile failed here ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    return None


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` at its first call while `compile_kernels` is on; call it as it is otherwise. Sizes stay
    symbolic, so that new numbers of tokens compile nothing new.

    Inside an autograd function, tensors are detached first: torch.compile would trace the function again for a view of
    another tensor and for one that requires a gradient.
    """
    compiled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        if not _compiling:
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True)
        if not torch.is_grad_enabled():
            plain: list[Any] = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            return compiled(*plain, **kwargs)
        return compiled(*args, **kwargs)

    return call
