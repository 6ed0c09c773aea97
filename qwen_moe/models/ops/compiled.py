"""Elementwise chains compiled into one kernel each by torch.compile: C++ on a CPU, Triton on a GPU.

Functions marked `fused` are written once, in plain torch, and compute the same compiled or not. Compilation is a switch of
the process, like `torch.set_num_threads`: `compile_kernels` sets it before a model is built. Training follows
`precision.compile`; verification in float64 and short runs do not compile.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_compiling = False


def compile_kernels(on: bool) -> None:
    """Set whether this process compiles functions marked `fused` from now on."""
    global _compiling
    _compiling = on


@contextlib.contextmanager
def with_compiled_kernels(on: bool) -> Iterator[None]:
    """If ``on``, functions marked `fused` are compiled meanwhile."""
    global _compiling
    before = _compiling
    _compiling = on or before
    try:
        yield
    finally:
        _compiling = before


def compiling() -> bool:
    return _compiling


def missing_compiler(device_type: str) -> str | None:
    """What compilation needs and this machine lacks, or None."""
    if device_type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton, which comes with CUDA builds of torch"
    if shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++"):
        return None
    return "C++ compiler: install g++ or clang++, or name one in the variable CXX"


def try_compiler(device: torch.device) -> str | None:
    """Compile and run a small kernel on ``device``. Returns None if it works, else one line that says why not."""
    x = torch.ones(2, 8, device=device)
    try:
        compiled(lambda x: x.sigmoid() + x, dynamic=True)(x)
    except Exception as error:  # a compiler, its cache folder or a driver may raise anything
        return f"torch.compile failed here ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    return None


def compiled(function: Callable[P, R], *, dynamic: bool | None = None) -> Callable[P, R]:
    """`torch.compile`, whose cache on the disk tells instruction sets apart.

    torch's key of compiled code has the settings of its compiler, but not the CPU's instructions, which decide how long a
    vector is. Code for another length leaves elements out, without an error. So the length is set here, as torch would
    choose it. A machine with a GPU compiles nothing for its CPU.
    """
    if not torch.cuda.is_available():
        # Imported here, because it takes seconds that a process without compiled code need not spend.
        from torch._inductor import config
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        if isa := pick_vec_isa():
            config.cpp.simdlen = isa.bit_width()
    return torch.compile(function, dynamic=dynamic)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` at its first call while compilation is on; otherwise call it directly. Sizes stay symbolic, so
    that another number of tokens needs no new compilation.

    Inside an autograd function, tensors are detached first: torch.compile would otherwise trace the function again for
    views and for tensors that require a gradient.
    """
    made: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal made
        if not _compiling:
            return function(*args, **kwargs)
        if made is None:
            made = compiled(function, dynamic=True)
        if not torch.is_grad_enabled():
            plain: list[Any] = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            return made(*plain, **kwargs)
        return made(*args, **kwargs)

    return call
