"""What a provider of kernels supplies to the layers of a model, and the plain provider: torch's own products.

A plan asks the provider, on the meta device, for the pieces of each block; the model's code stays as it is. Every piece
works at the level of autograd: it takes and gives whole tensors, so a provider may use functions of its own or modules
that do their own backward. Shapes: B batch, S sequence, ``n`` the size of an axis, A/O input/output features, N rows
sorted by expert, E experts of this rank.
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

# (x [B, S / n, A], *linears) -> tuple of [B, S, O_i / n], one for each linear.
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
    """Put ``replacement`` where ``parent``'s child ``name`` is, with the child's parameters (of the same names)."""
    replacement.load_state_dict(getattr(parent, name).state_dict(), assign=True)
    setattr(parent, name, replacement)


class Kernels:
    """The plain provider, and what others override.

    ``path`` is a module's full name in the whole model (the same on every stage): state is kept and saved under it.
    Layers are asked for while they are on the meta device and have their whole shapes; the plan then cuts parameters to
    this rank's part in place (it sets ``parent.child.weight`` anew), so a module must read its sizes from its weights.
    A provider's replacements keep the names of parameters. After FSDP the weights that a piece is given are gathered
    and in the compute dtype; within one step they do not change, and after it they do.
    """

    name = "torch"  # for people

    def __init__(self, tp: Axis) -> None:
        self.tp = tp

    def column(self, path: str, parent: nn.Module, names: Sequence[str]) -> Project | None:
        """The projections ``names`` of ``parent`` (linears of one input) over tp; may swap them. None: the model's own."""
        return partial(column_parallel, self.tp) if self.tp.size > 1 else None

    def row(self, path: str, parent: nn.Module, name: str) -> None:
        """Make linear ``name`` of ``parent`` row-parallel: ``[B, S, A / n] -> [B, S / n, O]``, in place."""
        if self.tp.size == 1:
            return
        old = getattr(parent, name)
        new = RowParallelLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.axis = self.tp
        swap(parent, name, new)

    def grouped(self, path: str, part: ExpertPart) -> GroupedMM | None:
        """The product of sorted rows with stacked weights. Where kernels need rows of an expert in multiples, it pads them
        itself, and no padded row enters a statistic or an output. None: the model's own."""
        return None

    def norm(self, path: str, parent: nn.Module, name: str) -> None:
        """May swap RMSNorm ``name`` of ``parent`` (attributes ``weight [D]``, ``eps``) for its own."""

    def materialize(self, device: torch.device) -> None:
        """Allocate the provider's state on ``device`` with its initial values. Once, after all layers were asked for."""

    def forward(self) -> AbstractContextManager[Any]:
        """Entered around each part's forward, by training and evaluation alike (not around recomputation)."""
        return nullcontext()

    def begin_step(self) -> None:
        """Before the first micro-batch of an optimizer step: weights quantized from now on may be kept until `end_step`."""

    def end_step(self) -> None:
        """After the last backward of the step, on every rank, before the optimizer changes the weights: let go of what
        was kept, and reduce statistics over ranks. Evaluation, loading and resuming come outside of steps only."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beside weights, by a name that no layout changes: whole tensors, equal on all ranks
        that give them. They share the provider's memory: loading into them restores it."""
        return {}
