"""Matmuls and norms by NVIDIA's Transformer Engine (TE) on GPUs, in bf16 or in FP8 by one of TE's four recipes.

This is the only file that uses TE. `tests/parallel/kernels/test_te_contract.py` checks every TE name in it against the
sources of the releases in SUPPORTED: ``te`` is `transformer_engine.pytorch`, ``te_recipe`` is its recipes, and variables
whose names begin with ``te_`` are TE objects.

TE's linear modules are kept outside the model and borrow our weights for each call (``functional_call``), so parameters
keep their names and stacked shapes, whatever FSDP does with them. Communication stays ours: TE gathers and scatters dim 0
of ``[S, B, D]``, while our sequences are dim 1. For the same reason LayerNormLinear is not used: under sequence parallelism
the gather lies between the norm and the projections, and an MoE's norm also feeds the router in high precision.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from parallel.collectives import gather_sequence, reduce_scatter_sequence
from parallel.kernels.interface import ExpertPart, GroupedMM, Kernels, Project, swap
from parallel.kernels.quantizer import Recipe
from parallel.mesh import Axis

# The releases whose sources were checked, one patch release each.
SUPPORTED = (
    "2.9.0", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0", "2.16.1", "2.17.1", "2.18.0", "2.19.0", "2.20.2",
)  # fmt: skip
# In FP8 a weight's features must be multiples of this; otherwise TE raises inside a layer.
MULTIPLE = {"delayed": 16, "current": 16, "blockwise": 16, "mxfp8": 32}
# An FP8 matmul of zero rows runs on this many rows of zeros instead: a multiple of every recipe's alignment.
SOME_ROWS = 32


class KernelsUnavailable(RuntimeError):
    """Transformer Engine, or one of its recipes, does not work here; the message says why and what to do."""


def load_transformer_engine() -> tuple[Any, Any]:
    """``transformer_engine.pytorch`` and ``transformer_engine.common.recipe``. Raises KernelsUnavailable."""
    use_torch = "or use precision.kernels=torch"
    _share_cudnn()
    try:
        import transformer_engine
        import transformer_engine.common.recipe as te_recipe
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise KernelsUnavailable(
            f"Transformer Engine cannot be imported ({type(error).__name__}: {error}): install qwen-moe[te] on a machine "
            f"with an NVIDIA GPU, {use_torch}"
        ) from error
    minor = transformer_engine.__version__.split("+")[0].split(".")[:2]
    if minor not in [release.split(".")[:2] for release in SUPPORTED]:
        first, last = SUPPORTED[0], SUPPORTED[-1]
        raise KernelsUnavailable(
            f"Transformer Engine {transformer_engine.__version__} is installed; supported are {first} to {last}: install "
            f"one of these, {use_torch}"
        )
    return te, te_recipe


def _share_cudnn() -> None:
    """Load all libraries of torch's cuDNN before TE looks for cuDNN. TE would otherwise load from the system the libraries
    that torch has not loaded yet, and two cuDNN releases in one process fail with undefined symbols."""
    if "CUDNN_HOME" in os.environ or "CUDNN_PATH" in os.environ:
        return  # the user's choice
    try:
        spec = find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return  # torch was built against the system's cuDNN
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for library in sorted(Path(folder, "lib").glob("libcudnn*.so.*")):
            with suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ["CUDNN_HOME"] = folder


def make_recipe(ours: Recipe, te: Any, te_recipe: Any, *, reduce_amax: bool) -> Any:
    """TE's recipe object for ``ours``. Raises KernelsUnavailable if this GPU does not support the recipe."""
    fp8_format = te_recipe.Format.HYBRID if ours.hybrid else te_recipe.Format.E4M3
    if ours.name == "delayed":
        works, why = te.is_fp8_available(return_reason=True)
        recipe = te_recipe.DelayedScaling(
            margin=ours.margin,
            fp8_format=fp8_format,
            amax_history_len=ours.history_length,
            amax_compute_algo="most_recent" if ours.most_recent else "max",
            reduce_amax=reduce_amax,
        )
    elif ours.name == "current":
        works, why = te.is_fp8_available(return_reason=True)
        recipe = te_recipe.Float8CurrentScaling(fp8_format=fp8_format)
    elif ours.name == "blockwise":
        works, why = te.is_fp8_block_scaling_available(return_reason=True)
        recipe = te_recipe.Float8BlockScaling(fp8_format=fp8_format)
    else:
        works, why = te.is_mxfp8_available(return_reason=True)
        recipe = te_recipe.MXFP8BlockScaling(fp8_format=fp8_format)
    if not works:
        raise KernelsUnavailable(
            f"this GPU cannot run precision.fp8.recipe {ours.name} in Transformer Engine: {why} Use another recipe, or "
            "precision.kernels=torch"
        )
    return recipe


class TransformerEngineKernels(Kernels):
    """The TE provider; without ``recipe`` it computes in bf16. ``stage``: the ranks over which delayed scaling takes the
    maximum amax. These are all ranks with this rank's layers, so that they quantize alike and hold equal state.

    ``keep_weights``: keep FP8 weights from a step's first micro-batch to its last; leave it off where parameters are
    gathered for each use to save memory (ZeRO-3). ``recompute``: layers run a second time in backward. Recipes without
    state do so under their own autocast; delayed scaling cannot, because its histories would advance twice.
    """

    name = "Transformer Engine"

    def __init__(
        self, tp: Axis, stage: Axis, recipe: Recipe | None, *, keep_weights: bool, recompute: bool = False
    ) -> None:
        super().__init__(tp)
        if recipe is not None and recipe.name == "delayed" and recompute:
            raise KernelsUnavailable(
                "Transformer Engine cannot recompute layers in backward with precision.fp8.recipe delayed: use "
                "training.recompute=none, or recipe current or blockwise"
            )
        self.te, te_recipe = load_transformer_engine()
        self.ours, self.group, self.recipe = recipe, stage.group, None
        self.keep_weights = keep_weights
        if recipe is not None:
            self.recipe = make_recipe(recipe, self.te, te_recipe, reduce_amax=stage.size > 1)
        self.matmuls: list[_Matmul] = []
        self.step, self._in_step, self._inside = 0, False, False

    def column(self, path: str, parent: nn.Module, names: Sequence[str]) -> Project:
        matmuls = []
        for name in names:
            linear = getattr(parent, name)
            matmuls.append(self._linear(f"{path}.{name}", linear.in_features, linear.out_features))

        def project(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
            if self.tp.size > 1:
                x = gather_sequence(x, self.tp)
            return tuple(matmul(x, linear.weight, linear.bias) for matmul, linear in zip(matmuls, linears, strict=True))

        return project

    def row(self, path: str, parent: nn.Module, name: str) -> None:
        old = getattr(parent, name)
        new = _RowLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.matmul, new.axis = self._linear(f"{path}.{name}", old.in_features, old.out_features), self.tp
        swap(parent, name, new)

    def grouped(self, path: str, part: ExpertPart) -> GroupedMM:
        matmul = _GroupedMatmul(self, path, part)
        self.matmuls.append(matmul)
        return matmul

    def norm(self, path: str, parent: nn.Module, name: str) -> None:
        """TE's RMSNorm computes in float32 and rounds once at the end. Ours rounds before the weight, like transformers."""
        te, old = self.te, getattr(parent, name)
        te_norm = te.RMSNorm(old.weight.shape[0], eps=old.eps, dtype=old.weight.dtype, device="meta")
        te_norm.weight = old.weight
        setattr(parent, name, te_norm)

    def _linear(self, path: str, in_features: int, out_features: int) -> "_LinearMatmul":
        self.check_sizes(path, out_features, in_features)
        matmul = _LinearMatmul(self, path)
        self.matmuls.append(matmul)
        return matmul

    def check_sizes(self, path: str, out_features: int, in_features: int) -> None:
        """Raise KernelsUnavailable unless TE has FP8 kernels for a weight of this size."""
        multiple = MULTIPLE[self.ours.name] if self.ours is not None else 1
        if in_features % multiple or out_features % multiple:
            assert self.ours is not None
            raise KernelsUnavailable(
                f"{path} is {out_features} x {in_features} on a rank: precision.fp8.recipe {self.ours.name} needs "
                f"multiples of {multiple} in Transformer Engine. Change sizes or tp, or use precision.compute=bf16"
            )

    def materialize(self, device: torch.device) -> None:
        if self.ours is not None and self.ours.name == "delayed":
            steps = self.ours.history_length
            for matmul in self.matmuls:
                matmul.state = [
                    _State(torch.ones(n, device=device), torch.zeros(steps, n, device=device))
                    for n in (3 * matmul.gemms, 2 * matmul.gemms)
                ]

    def autocast(self) -> AbstractContextManager[Any]:
        te = self.te
        return te.autocast(enabled=self.recipe is not None, recipe=self.recipe, amax_reduction_group=self.group)

    @contextmanager
    def forward(self) -> Iterator[None]:
        # Leaving the outermost autocast reduces and applies delayed scaling's amax: once per stage module's forward.
        with self.autocast():
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def recomputed(self) -> AbstractContextManager[Any]:
        """The context of one matmul: empty within `forward`, an autocast when a layer is recomputed in backward."""
        return nullcontext() if self._inside else self.autocast()

    def begin_step(self) -> None:
        self.step, self._in_step = self.step + 1, True
        # Drop the amax that an evaluation has recorded.
        current = [state.amax_history[0] for matmul in self.matmuls for state in matmul.state]
        if current:
            torch._foreach_zero_(current)

    def end_step(self) -> None:
        self._in_step = False

    def first_use(self, matmul: "_Matmul") -> bool | None:
        """TE's ``is_first_microbatch``: quantize the weights (True), reuse an earlier micro-batch's (False), or keep none
        (None)."""
        if not self.keep_weights or not self._in_step or not torch.is_grad_enabled():
            return None
        first, matmul.used_in = matmul.used_in != self.step, self.step
        return first

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor for matmul in self.matmuls for name, tensor in matmul.named_state()}


class _State:
    """Delayed scaling's state for ``n`` tensors: ``scale [n]`` and ``amax_history [steps, n]``."""

    def __init__(self, scale: torch.Tensor, amax_history: torch.Tensor) -> None:
        self.scale, self.amax_history = scale, amax_history


class _Matmul:
    """One TE module, made at its first use, and its state. It is not an nn.Module, so that it adds no parameters to the
    model."""

    gemms = 1

    def __init__(self, kernels: TransformerEngineKernels, path: str) -> None:
        self.kernels, self.path, self.used_in = kernels, path, -1
        self.state: list[_State] = []  # forward, backward; empty for recipes without state

    def adopt(self, te_module: Any) -> None:
        """Copy the materialized or loaded state into a new ``te_module``, whose own tensors are the state from then on.
        Call it within an autocast, from which the module takes its recipe."""
        if not self.state:
            return
        te_module.init_fp8_metadata(num_gemms=self.gemms)
        te_forward, te_backward = te_module.fp8_meta["scaling_fwd"], te_module.fp8_meta["scaling_bwd"]
        for held, te_state in zip(self.state, (te_forward, te_backward), strict=True):
            te_state.scale.copy_(held.scale)
            te_state.amax_history.copy_(held.amax_history)
        self.state = [
            _State(te_forward.scale, te_forward.amax_history),
            _State(te_backward.scale, te_backward.amax_history),
        ]

    def named_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for direction, state in zip(("forward", "backward"), self.state):
            each = state.scale.numel() // self.gemms
            for name, of in self._places():
                part = slice(of * each, (of + 1) * each)
                yield f"{name}.{direction}.scale", state.scale[part]
                yield f"{name}.{direction}.amax_history", state.amax_history[:, part]

    def _places(self) -> Iterator[tuple[str, int]]:
        """(name, index among this module's GEMMs) of each GEMM."""
        yield self.path, 0


class _LinearMatmul(_Matmul):
    """``matmul(x [..., A], weight [O, A], bias [O] or None) -> [..., O]``."""

    te_linear: Any = None

    def _make(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        te, (out_features, in_features) = self.kernels.te, weight.shape
        self.kernels.check_sizes(self.path, out_features, in_features)
        te_linear = te.Linear(
            in_features, out_features, bias=bias is not None, params_dtype=weight.dtype, device="meta"
        )
        self.adopt(te_linear)
        return te_linear

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernels = self.kernels
        with kernels.recomputed():
            te_linear = self.te_linear = self.te_linear or self._make(weight, bias)
            lent = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            options = {"is_first_microbatch": kernels.first_use(self)}
            return functional_call(te_linear, lent, (x,), options, tie_weights=False)


class _GroupedMatmul(_Matmul):
    """``matmul(x [N, A], weight [E, O, A], counts [E]) -> [N, O]``: rows of expert e follow those of e - 1.

    In FP8 each expert's rows are padded with zeros to the multiple that the recipe needs, and the results of these rows are
    dropped. Zeros do not change an amax. ``counts`` is read on the host once per call, because TE takes a list.
    """

    te_grouped_linear: Any = None

    def __init__(self, kernels: TransformerEngineKernels, path: str, part: ExpertPart) -> None:
        super().__init__(kernels, path)
        self.part, self.gemms = part, part.count
        te = kernels.te
        self.te_padding, self.te_unpadding = te.Fp8Padding(part.count), te.Fp8Unpadding(part.count)

    def _places(self) -> Iterator[tuple[str, int]]:
        for place in range(self.part.count):
            yield f"{self.path}.{self.part.first + place}", place

    def _make(self, weight: torch.Tensor) -> Any:
        te, (_, out_features, in_features) = self.kernels.te, weight.shape
        self.kernels.check_sizes(self.path, out_features, in_features)
        te_grouped_linear = te.GroupedLinear(
            self.gemms, in_features, out_features, bias=False, params_dtype=weight.dtype, device="meta"
        )
        self.adopt(te_grouped_linear)
        return te_grouped_linear

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        kernels, splits, rows = self.kernels, counts.tolist(), x.shape[0]
        if not rows:  # the kernels need some rows, and delayed scaling needs every rank to take part
            x, splits = x.new_zeros(SOME_ROWS, x.shape[1]) + x.sum(), [SOME_ROWS] + [0] * (self.gemms - 1)
        with kernels.recomputed():
            te_grouped_linear = self.te_grouped_linear = self.te_grouped_linear or self._make(weight)
            padded, padded_splits = x, splits
            if kernels.recipe is not None:
                padded, padded_splits = self.te_padding(x, splits)
            lent = {f"weight{expert}": w for expert, w in enumerate(weight.unbind(0))}
            options = {"is_first_microbatch": kernels.first_use(self)}
            y = functional_call(te_grouped_linear, lent, (padded, padded_splits), options, tie_weights=False)
            if kernels.recipe is not None:
                y = self.te_unpadding(y, splits)
        return y if y.shape[0] == rows else y[:rows]


class _RowLinear(nn.Linear):
    """``[B, S, A / n] -> [B, S / n, O]`` with the provider's matmul. The bias is added to the reduced sum."""

    matmul: Callable[..., torch.Tensor]
    axis: Axis

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return self.matmul(input, self.weight, self.bias)
        y = reduce_scatter_sequence(self.matmul(input, self.weight, None), self.axis)
        return y if self.bias is None else y + self.bias
