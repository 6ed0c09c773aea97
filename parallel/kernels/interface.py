"""The interface of kernel providers, and the plain provider, which uses torch's own matmuls.

Sharding asks the provider for replacements of a block's layers while the model is on the meta device; the model's code does
not change. A replacement is differentiable and works on whole tensors, so a provider may use its own autograd functions or
modules. Shapes: B batch, S sequence, ``n`` the size of an axis, A/O input/output features, N rows sorted by expert,
E experts of this rank.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from parallel.mesh import Axis
from parallel.tensor import RowParallelLinear, column_parallel

# (x [B, S / n, A], *linears) -> tuple of [B, S, O_i / n], one per linear layer.
Project = Callable[..., tuple[torch.Tensor, ...]]
# (x [N, A], weight [E, O, A], counts [E]) -> [N, O]; rows of expert e follow those of e - 1.
GroupedMM = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """The experts ``first .. first + count`` of ``total`` that this rank holds."""

    total: int
    first: int
    count: int


def swap(parent: nn.Module, name: str, replacement: nn.Module) -> None:
    """Replace ``parent``'s child ``name`` with ``replacement``, which takes over the child's parameters by name."""
    replacement.load_state_dict(getattr(parent, name).state_dict(), assign=True)
    setattr(parent, name, replacement)


class Kernels:
    """The plain provider, and the base class of the others.

    ``path`` is a module's full name in the whole model (the same on every stage); state is kept and saved under it.
    Sharding asks for replacements while layers are on the meta device with their whole shapes. It then replaces each
    ``parent.child.weight`` by this rank's part, so a module must read its sizes from its weights. Replacements keep the
    names of parameters. Under FSDP a replacement receives weights that are gathered and in the compute dtype; they change
    between optimizer steps, never within one.
    """

    name = "torch"  # shown to users

    def __init__(self, tp: Axis) -> None:
        self.tp = tp

    def column(self, path: str, parent: nn.Module, names: Sequence[str]) -> Project | None:
        """A column-parallel `Project` over tp for ``parent``'s linears ``names``, which share one input. May swap the
        linears. None: the model's own projection is kept."""
        return partial(column_parallel, self.tp) if self.tp.size > 1 else None

    def row(self, path: str, parent: nn.Module, name: str) -> None:
        """Make linear ``name`` of ``parent`` row-parallel in place: ``[B, S, A / n] -> [B, S / n, O]``."""
        if self.tp.size == 1:
            return
        old = getattr(parent, name)
        new = RowParallelLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.axis = self.tp
        swap(parent, name, new)

    def grouped(self, path: str, part: ExpertPart) -> GroupedMM | None:
        """A grouped GEMM of sorted rows with stacked weights. It pads an expert's rows itself if its kernels need a
        multiple, and no padded row enters an amax or an output. None: the model's own is kept."""
        return None

    def norm(self, path: str, parent: nn.Module, name: str) -> None:
        """May replace RMSNorm ``name`` of ``parent`` (attributes ``weight [D]``, ``eps``) by the provider's own."""

    def materialize(self, device: torch.device) -> None:
        """Allocate the provider's state on ``device`` with its initial values. Called once, after all layers are built."""

    def forward(self) -> AbstractContextManager[Any]:
        """A context around each stage module's forward, in training and evaluation (not around recomputation)."""
        return nullcontext()

    def begin_step(self) -> None:
        """Called before the first micro-batch of an optimizer step. Weights quantized from now on may be kept until
        `end_step`."""

    def end_step(self) -> None:
        """Called on every rank after the step's last backward, before the optimizer changes the weights. Frees kept weights
        and reduces amax over ranks. Evaluation, loading and resuming happen only outside a step."""

    def state(self) -> dict[str, torch.Tensor]:
        """State that a checkpoint must hold besides weights, by names that do not depend on the layout. Tensors are whole
        and equal on all ranks that return them. They share the provider's memory, so loading into them restores it."""
        return {}
