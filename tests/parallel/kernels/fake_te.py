"""A stand-in for Transformer Engine on the CPU: its signatures and rules, plain torch arithmetic, nothing quantized.

What the real one would refuse, or get silently wrong, fails or shows here: weights that were not lent or are stale, rows
that are not aligned, modules of FP8 outside of an autocast, matmuls left out of the reduction over ranks.
`test_the_fake_has_the_real_signatures` compares it with the real sources.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RECIPE_FIELDS = {
    "DelayedScaling": ("margin", "fp8_format", "amax_history_len", "amax_compute_algo", "reduce_amax"),
    "Float8CurrentScaling": ("fp8_format",),
    "Float8BlockScaling": ("fp8_format",),
    "MXFP8BlockScaling": ("fp8_format",),
}
MAXIMUM = {"forward": 448.0, "backward": 57344.0}  # of E4M3 and E5M2


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class _Recipe:
    def __init__(self, **values: Any) -> None:
        unknown = set(values) - set(RECIPE_FIELDS[type(self).__name__])
        assert not unknown, unknown
        self.__dict__.update(values)


class DelayedScaling(_Recipe):
    pass


class Float8CurrentScaling(_Recipe):
    pass


class Float8BlockScaling(_Recipe):
    pass


class MXFP8BlockScaling(_Recipe):
    pass


class _Global:
    """FP8GlobalStateManager: the autocast that is active and the amaxes that its end reduces."""

    depth, enabled, recipe, group = 0, False, None, None
    first_module = False
    modules: ClassVar[list[Any]] = []
    log: ClassVar[list[str]] = []  # the direction of every reduction


def is_fp8_available(return_reason: bool = False) -> Any:
    return (True, "") if return_reason else True


is_fp8_block_scaling_available = is_fp8_available


def is_mxfp8_available(return_reason: bool = False) -> Any:
    reason = "Device compute capability 10.0 or higher required for MXFP8 execution."
    return (False, reason) if return_reason else False


@contextmanager
def autocast(enabled: bool = True, recipe: Any = None, amax_reduction_group: Any = None) -> Iterator[None]:
    before = (_Global.enabled, _Global.recipe, _Global.group)
    _Global.enabled, _Global.recipe, _Global.group = enabled, recipe, amax_reduction_group
    _Global.first_module = _Global.first_module or _Global.depth == 0
    _Global.depth += 1
    try:
        yield
    finally:
        _Global.enabled, _Global.recipe, _Global.group = before
        _Global.depth -= 1
        if enabled and _Global.depth == 0 and torch.is_grad_enabled():
            _reduce_and_update("forward")


def _reduce_and_update(direction: str) -> None:
    """Of every module that ran with delayed scaling, whatever autocast ends: each by its own recipe and group."""
    if _Global.modules:
        _Global.log.append(direction)
    for recipe, group in {id(recipe): (recipe, group) for _, recipe, group in _Global.modules}.values():
        states = [module.fp8_meta[KEY[direction]] for module, own, _ in _Global.modules if own is recipe]
        amaxes = torch.cat([state.amax_history[0] for state in states])
        if recipe.reduce_amax:
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
        for state, amax in zip(states, amaxes.split([s.scale.numel() for s in states])):
            state.amax_history[0] = amax
            largest = state.amax_history.amax(0)
            state.scale.copy_(torch.where(largest > 0, MAXIMUM[direction] / largest, state.scale))
            state.amax_history.copy_(state.amax_history.roll(-1, 0))
            state.amax_history[0] = 0


KEY = {"forward": "scaling_fwd", "backward": "scaling_bwd"}


class DelayedScalingRecipeState:
    def __init__(self, recipe: Any, n: int) -> None:
        self.scale = torch.ones(n)
        self.amax_history = torch.zeros(recipe.amax_history_len, n)


class _Observe(torch.autograd.Function):
    """Identity; backward notes the gradient's amax for each group of rows."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, module: Any, splits: list[int], recipe: Any) -> Any:
        ctx.known = (module, splits, recipe)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        module, splits, recipe = ctx.known
        module._check(gradients[0], splits, recipe)
        if isinstance(recipe, DelayedScaling):
            module._note("backward", 0, gradients[0], splits)
        return gradients[0], None, None, None


class _AtEnd(torch.autograd.Function):
    """Identity on the input of a module: its backward is the end of the module's backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        _reduce_and_update("backward")
        return gradients[0]


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self.fp8_initialized = False
        self._workspaces: dict[str, torch.Tensor] = {}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        if not _Global.enabled or self.fp8_initialized:
            return
        self.fp8_initialized = True
        if isinstance(_Global.recipe, DelayedScaling):
            self.fp8_meta["scaling_fwd"] = DelayedScalingRecipeState(_Global.recipe, 3 * num_gemms)
            self.fp8_meta["scaling_bwd"] = DelayedScalingRecipeState(_Global.recipe, 2 * num_gemms)

    def _check(self, rows: torch.Tensor, splits: list[int], recipe: Any) -> None:
        if recipe is None:
            return
        multiple = 32 if isinstance(recipe, MXFP8BlockScaling) else 16
        assert rows.shape[-1] % multiple == 0, "features are not aligned"
        if len(splits) > 1:
            assert all(split % multiple == 0 for split in splits), f"rows of groups are not aligned: {splits}"

    def _note(self, direction: str, which: int, rows: torch.Tensor, splits: list[int]) -> None:
        each = {"forward": 3, "backward": 2}[direction]
        history = self.fp8_meta[KEY[direction]].amax_history
        for group, part in enumerate(rows.detach().flatten(0, -2).split(splits)):
            if part.numel():
                place = history[0, group * each + which]
                place.copy_(torch.maximum(place, part.abs().max()))

    def _run(self, x: torch.Tensor, names: list[str], splits: list[int], first: bool | None) -> Any:
        """Input and weights as the matmul sees them, after what the real one does before it."""
        assert _Global.depth, "a matmul outside of every autocast"
        given = dict(self.named_parameters())
        # Release 2.9 asks its first parameter for the device.
        assert next(iter(given.values())).device.type != "meta", "weights were not lent"
        assert all(p.dtype == x.dtype for p in given.values()), "input and weights differ in dtype"
        self.init_fp8_metadata(num_gemms=len(names))
        recipe = _Global.recipe if _Global.enabled else None
        self._check(x, splits, recipe)
        weights = [getattr(self, name) for name in names]
        if isinstance(recipe, DelayedScaling):
            if all(module is not self for module, _, _ in _Global.modules):
                _Global.modules.append((self, recipe, _Global.group))
            self._note("forward", 0, x, splits)
            for group, weight in enumerate(weights):
                place = self.fp8_meta["scaling_fwd"].amax_history[0, 3 * group + 1]
                place.copy_(torch.maximum(place, weight.detach().abs().max()))
            if _Global.first_module and x.requires_grad:
                _Global.first_module = False
                x = _AtEnd.apply(x)
        if recipe is not None and first is not None:
            for name, weight in zip(names, weights):
                if first or name not in self._workspaces:
                    self._workspaces[name] = weight.detach().clone()
            # The kept copy is used in the matmul, the gradient goes to the weight that was given.
            weights = [weight + (self._workspaces[n] - weight).detach() for n, weight in zip(names, weights)]
        return x, weights, recipe

    def _observe(self, y: torch.Tensor, splits: list[int], recipe: Any) -> torch.Tensor:
        return _Observe.apply(y, self, splits, recipe)


class Linear(_Base):
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, params_dtype: Any = None, device: Any = "cuda"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        self.use_bias = bias

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        rows = inp.numel() // inp.shape[-1]
        inp, (weight,), recipe = self._run(inp, ["weight"], [rows], is_first_microbatch)
        return self._observe(F.linear(inp, weight, self.bias if self.use_bias else None), [rows], recipe)


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: Any = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0]
        assert inp.shape[0], "no rows"
        names = [f"weight{i}" for i in range(self.num_gemms)]
        inp, weights, recipe = self._run(inp, names, m_splits, is_first_microbatch)
        y = torch.cat([F.linear(part, w) for part, w in zip(inp.split(m_splits), weights, strict=True)])
        return self._observe(y, m_splits, recipe)


class Fp8Padding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        assert len(m_splits) == self.num_gemms
        padded = self.padded(m_splits)
        if padded == m_splits:
            return inp, m_splits
        parts = [F.pad(p, (0, 0, 0, to - p.shape[0])) for p, to in zip(inp.split(m_splits), padded)]
        return torch.cat(parts), padded

    def padded(self, m_splits: list[int]) -> list[int]:
        if self.align_size is None:
            assert _Global.enabled, "the alignment is that of the active recipe"
            self.align_size = 32 if isinstance(_Global.recipe, MXFP8BlockScaling) else 16
        return [-(-m // self.align_size) * self.align_size for m in m_splits]


class Fp8Unpadding(Fp8Padding):
    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:  # type: ignore[override]
        padded = self.padded(m_splits)
        if padded == m_splits:
            return inp
        return torch.cat([part[:m] for part, m in zip(inp.split(padded), m_splits)])


class RMSNorm(nn.Module):
    def __init__(self, normalized_shape: Any, eps: float = 1e-5, dtype: Any = None, device: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        wide = input if input.dtype == torch.float64 else input.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(input.dtype)


def install(version: str = "2.20.2") -> None:
    """Make `import transformer_engine` find this, in this process."""
    package = types.ModuleType("transformer_engine")
    package.__version__ = version  # type: ignore[attr-defined]
    common = types.ModuleType("transformer_engine.common")
    here = sys.modules[__name__]
    common.recipe = package.pytorch = here  # type: ignore[attr-defined]
    package.common = common  # type: ignore[attr-defined]
    names = ("", ".pytorch", ".common", ".common.recipe")
    for name, module in zip(names, (package, here, common, here)):
        sys.modules[f"transformer_engine{name}"] = module
    _Global.modules, _Global.log = [], []


def uninstall() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
