"""Counts what code launches on a device: operations with their bytes and FLOPs, waits of the host, and collectives.

The code runs on fake tensors, which have shapes but no values. ``DEVICE`` stands for the accelerator and plain ``cpu`` for
the host, so that copies between the two are seen, and a mix of both in one operation is an error, as it is on a GPU.
"""

import bisect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from parallel.data import local
from qwen_moe.errors import UserError
from qwen_moe.models.ops import rms_norm
from qwen_moe.tracing.cost import NO_KERNEL, Work, bytes_of, flops_of, is_view, tensors_in, traffic

DEVICE = torch.device("cpu", 0)
HOST = torch.device("cpu")
_aten = torch.ops.aten
_ROOT = Path(__file__).parents[2]
_HERE = str(Path(__file__).parent)
_FSDP = "_fully_shard"
_CHAIN = rms_norm._forward.__code__  # the code of every function marked `fused`
_NO_NODE = 2**63  # sequence numbers of nodes that accumulate gradients are above this


@dataclass(frozen=True, order=True)
class Place:
    """Where in a step an operation belongs. ``layer`` is -1 outside layers."""

    layer: int
    part: str
    phase: str = ""


@dataclass
class Collective:
    """One collective of this rank. ``bytes``: its tensor before an all-to-all or a reduce-scatter, after an all-gather.
    ``behind_flops`` and ``behind_launches``: what this rank launched between its start and the wait for it."""

    kind: str
    axis: str
    ranks: int
    bytes: int
    place: Place
    where: str
    own_stream: bool  # FSDP2 runs it on a stream of its own; when a GPU needs its result cannot be seen here
    behind_flops: int = 0
    behind_launches: int = 0


@dataclass(frozen=True)
class Event:
    """A wait of the host for the device, a copy from the host, or an index kernel over tokens times experts."""

    kind: str
    op: str
    place: Place
    where: str


def caller() -> str:
    """The innermost line of this package on the stack, without this folder."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(_ROOT)) and not path.startswith(_HERE) and ".venv" not in path:
            return f"{Path(path).relative_to(_ROOT).as_posix()}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "called by torch"


def _in_fsdp() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if _FSDP in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


_SCALES = "parallel/kernels/"  # FP8's scales of blocks are tested by flags and bits, and are no indices
# Methods of a process group, and which of their tensors a collective's size is that of.
_METHODS: dict[str, str] = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_gather_single": "all_gather",  # torch 2.13 renamed three of these
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "alltoall_base": "all_to_all",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """A context, entered inside a FakeTensorMode, that counts what is launched on `DEVICE`.

    ``places``: the place of each module. ``axes``: the axes of each process group, by its name. ``number``: what the host
    reads where it reads a fraction; integers of the device are 1. ``wide``: in parts named ``experts``, an operation on
    integers or flags of as many elements is an index kernel over tokens times experts.
    """

    def __init__(self, places: dict[nn.Module, Place], axes: dict[str, set[str]], number: float, wide: int) -> None:
        super().__init__()
        self.outside = "rest of the step"
        self.reset()
        self._places, self._axes, self._number, self._wide = places, axes, number, wide
        self._stack: list[Place] = []
        self._numbers: list[int] = [0]  # sequence numbers of autograd nodes from which a place holds
        self._at: list[Place] = [Place(-1, "loss")]
        self._last = Place(-1, "loss")
        self._chain: Any = None
        self._patches = ExitStack()

    def reset(self) -> None:
        """Forget what was counted."""
        self.work: dict[tuple[Place, str], Work] = {}
        self.collectives: list[Collective] = []
        self.events: list[Event] = []
        self.flops = self.launches = 0
        self._flying: dict[int, tuple[Collective, Any]] = {}

    def __enter__(self) -> "Counter":
        enter = self._patches.enter_context
        for method in _METHODS:
            if hasattr(dist.ProcessGroup, method):
                original = getattr(dist.ProcessGroup, method)
                enter(mock.patch.object(dist.ProcessGroup, method, self._watched(method, original)))
        for work in (torch._C._distributed_c10d.FakeWork, dist.Work):
            enter(mock.patch.object(work, "wait", self._watched_wait(work.wait)))
        enter(mock.patch.object(FakeTensor, "tolist", lambda tensor: self._tolist(tensor)))
        enter(mock.patch.object(torch, "tensor", self._tensor(torch.tensor)))
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ):
            self._patches.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    # Where an operation belongs

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        outer = self._stack[-1] if self._stack else Place(-1, "loss")
        self._stack.append(self._places.get(module, outer))
        self._mark()

    def _leave_module(self, module: nn.Module, args: Any, out: Any) -> None:
        self._stack.pop()
        self._mark()

    @contextmanager
    def within(self, place: Place) -> Iterator[None]:
        """Book what follows under ``place``: for parts of a module that are called by themselves."""
        self._stack.append(place)
        self._mark()
        yield
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._at.append(self._stack[-1] if self._stack else Place(-1, "loss"))

    def place(self) -> Place:
        """Forward by the modules on the stack; backward by the autograd node, whose number says where it was made."""
        node = torch._C._current_autograd_node()
        if self._stack:
            here, phase = self._stack[-1], "forward" if node is None else "recomputed"
        elif node is not None:
            number = node._sequence_nr()
            if number < _NO_NODE:
                self._last = self._at[bisect.bisect_right(self._numbers, number) - 1]
            here, phase = self._last, "backward"
        else:
            return Place(-1, self.outside)
        return Place(here.layer, here.part, phase)

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        if func._schema.name.startswith(("prim::", "c10d::")):
            return func(*args, **kwargs)
        if any(map(is_traceable_wrapper_subclass, given)):
            # Operations on a DTensor's local tensors come here too or, where torch runs them at once, do not.
            before = self.launches
            out = func(*args, **kwargs)
            if self.launches == before:
                self._seen(func, *tree_map_only(DTensor, local, (args, kwargs, out)))
            return out
        try:
            if func is _aten._local_scalar_dense.default:
                return self._read(func, given)
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            return self._read(func, given)
        except (DynamicOutputShapeException, UnsupportedOperatorException):
            return self._shape_of_values(func, given)
        self._seen(func, args, kwargs, out)
        return out

    def _seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        found = tensors_in(out)
        devices = {t.device for t in tensors_in((args, kwargs))} | {t.device for t in found}
        if DEVICE not in devices or is_view(func) or func._schema.name in NO_KERNEL:
            return
        self._count(func, args, kwargs, out)
        if devices == {DEVICE, HOST}:
            self._crossing(func, args, kwargs, found[0] if found else args[0])

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        place, name = self.place(), func._schema.name.replace("aten::", "")
        work = self.work.setdefault((place, name), Work())
        read, written = traffic(func, args, kwargs, out)
        flops = flops_of(func, args, kwargs, out)
        work.launches += 1
        work.read += read
        work.written += written
        work.flops += flops
        self.launches += 1
        self.flops += flops
        chain = self._chain_of()
        if chain is not None:
            work.chained += 1
            work.chains += chain is not self._chain
        self._chain = chain
        indices = (t for t in tensors_in((args, kwargs, out)) if not t.is_floating_point())
        if place.part == "experts" and any(t.numel() >= self._wide for t in indices) and _SCALES not in caller():
            self._event("index kernel over tokens x experts", func)

    @staticmethod
    def _chain_of() -> Any:
        frame: Any = sys._getframe(2)
        for _ in range(12):
            if frame is None or frame.f_code is _CHAIN:
                return frame
            frame = frame.f_back
        return None

    def _crossing(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        """A copy between host and device. A kernel that takes a number from the host is none."""
        if func._schema.name not in ("aten::copy_", "aten::_to_copy"):
            return
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        kind = "copy to the host" if result.device == HOST else "copy from the host"
        self._event(kind if waits else f"{kind} without a wait", func)

    def _event(self, kind: str, func: Any) -> None:
        self.events.append(Event(kind, func._schema.name.replace("aten::", ""), self.place(), caller()))

    def _read(self, func: Any, given: Iterable[torch.Tensor]) -> Any:
        """A value that the host reads. Values of the host itself are known to it without a wait, but not to us."""
        if any(t.device == DEVICE for t in given):
            self._event("value read by the host", func)
        tensor = next(iter(given))
        return self._value(tensor) if func is _aten._local_scalar_dense.default else True

    def _value(self, tensor: torch.Tensor) -> bool | int | float:
        """What the host finds in a tensor. Its own integers are places in lists, so that 0 is safe."""
        if tensor.dtype == torch.bool:
            return True
        return self._number if tensor.is_floating_point() else int(tensor.device == DEVICE)

    def _shape_of_values(self, func: Any, given: list[torch.Tensor]) -> Any:
        """A result whose size depends on values. ``nonzero`` and ``masked_select`` go on as if all were chosen."""
        self._event("result sized by values", func)
        x = given[0]
        if func is _aten.nonzero.default:
            return torch.zeros(x.numel(), x.ndim, dtype=torch.int64, device=x.device)
        if func is _aten.masked_select.default:
            return torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
        raise UserError(
            f"{func._schema.name} at {caller()} has a result whose size depends on values, so the trace ends there: the "
            "host waits for the device to learn it. Use an operation whose size is known"
        )

    def _tolist(self, tensor: torch.Tensor) -> Any:
        if tensor.device == DEVICE:
            self.events.append(Event("value read by the host", "tolist", self.place(), caller()))
        return _nested(list(tensor.shape), self._value(tensor))

    def _tensor(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`torch.tensor`, which copies numbers of Python to the device; fake ones would stay on the host."""

        def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
            made = original(data, **kwargs)
            if device != DEVICE:
                return made
            return torch.zeros(made.shape, dtype=made.dtype).to(device)  # torch would remember a single number's device

        return tensor

    # Collectives

    def _watched(self, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        counter = self

        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            work = original(group, *args, **kwargs)
            counter._sent(method, group, args, work)
            return work

        return call

    def _sent(self, method: str, group: dist.ProcessGroup, args: Any, work: Any) -> None:
        if group.size() == 1:
            return
        # The first two arguments are tensors: of all but reductions and point-to-point messages, output and input.
        size = max((sum(bytes_of(t) for t in tensors_in(arg)) for arg in args[:2]), default=0)
        if _METHODS[method] == "all_to_all":
            size = sum(bytes_of(t) for t in tensors_in(args[1]))
        kind, place, fsdp = _METHODS[method], self.place(), _in_fsdp()
        if kind in ("send", "receive") and place.layer < 0:
            place = Place(-1, "between stages")
        call = Collective(
            kind=kind,
            axis=_axis(self._axes.get(group.group_name, {group.group_desc}), kind, place, fsdp),
            ranks=group.size(),
            bytes=size,
            place=place,
            where=caller(),
            own_stream=fsdp,
            behind_flops=-self.flops,  # `_land` adds what has been counted by then
            behind_launches=-self.launches,
        )
        self.collectives.append(call)
        self._flying[id(work)] = (call, work)  # the work is kept, so that no other gets its address

    def _watched_wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        counter = self

        def wait(work: Any, *timeout: Any) -> Any:
            counter._land(work)
            return original(work, *timeout)

        return wait

    def _land(self, work: Any) -> None:
        call, _ = self._flying.pop(id(work), (None, None))
        if call is not None:
            call.behind_flops += self.flops
            call.behind_launches += self.launches

    def finish(self) -> None:
        """Collectives that nothing waited for: they end with the step."""
        for call, _ in list(self._flying.values()):
            call.behind_flops += self.flops
            call.behind_launches += self.launches
        self._flying.clear()


def _axis(names: set[str], kind: str, place: Place, fsdp: bool) -> str:
    """The axis that a collective is over. Axes of the same ranks share a process group, so use and place decide."""
    order: tuple[str, ...] = ("tp", "cp", "cp_outer", "cp_heads", "pp", "stage", "dp")
    if fsdp:
        order = ("edp",) if place.part == "experts" else ("dp", "data")
    elif kind == "all_to_all" and place.part == "experts":
        order = ("ep", "ep x etp")
    elif not place.phase and kind == "all_reduce":
        order = ("world",)
    return next((name for name in order if name in names), min(names))


def _nested(shape: list[int], number: bool | int | float) -> Any:
    if not shape:
        return number
    return [_nested(shape[1:], number) for _ in range(shape[0])]
