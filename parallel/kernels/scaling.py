"""Delayed scaling (arXiv 2209.05433; TE's DelayedScaling): each tensor's scale comes from its amax in earlier steps, shared
by all ranks that hold a part of the tensor."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from parallel.kernels.formats import FP32_MAX, LARGEST
from parallel.mesh import Axis


@dataclass
class DelayedScaling:
    """Scales of named tensors of this rank's layers, in one flat table. A stacked tensor has one entry per expert.

    During a step, amax is recorded while ``scale`` stays fixed. `end_step` takes the maximum over ``stage``, prepends it to
    the history of ``length`` steps and sets the next step's scale to ``LARGEST / max(history) / 2^margin`` (with
    ``most_recent``, to the newest entry's). Recording a tensor twice (in a recomputed forward) changes nothing.

    Why ``stage``: a dense tensor is split over tp ranks (features or sequence) and over cp and dp ranks (tokens). An
    expert's rows are split over edp ranks and its features over etp ranks. ep ranks hold different experts: each records
    its own experts' entries and leaves 0 in the others, which does not affect a maximum. All of these ranks hold the same
    layers as this rank, so one all-reduce over ``stage`` serves both kinds. Pipeline ranks hold other tensors at the same
    entries of the table, so nothing is reduced over pp. TE uses the same group (`amax_reduction_group`) but reduces after
    each forward and backward. Here the reduction is once per step, so that scales do not depend on the schedule or the
    number of micro-batches.
    """

    stage: Axis
    length: int
    most_recent: bool
    margin: int
    slots: dict[str, tuple[int, int]] = field(default_factory=dict)
    formats: list[torch.dtype] = field(default_factory=list)

    def add(self, name: str, fp8: torch.dtype, count: int = 1) -> None:
        """Register a tensor, or ``count`` of them under one name."""
        assert name not in self.slots, name
        self.slots[name] = (len(self.formats), count)
        self.formats += [fp8] * count

    def materialize(self, device: torch.device) -> None:
        size = len(self.formats)
        self.amax = torch.zeros(size, device=device)
        self.history = torch.zeros(size, self.length, device=device)  # newest first
        self.scale = torch.ones(size, device=device)
        self.largest = torch.tensor([LARGEST[fp8] for fp8 in self.formats], device=device)

    def note(self, name: str, amax: torch.Tensor, first: int = 0) -> None:
        """Record ``amax []`` or ``[E]`` for the entries of ``name`` from ``first`` on."""
        start, _ = self.slots[name]
        own = self.amax[start + first : start + first + amax.numel()]
        torch.maximum(own, amax.reshape(-1), out=own)

    def scales(self, name: str, first: int = 0, count: int = 1) -> torch.Tensor:
        """This step's scales ``[count]`` of the entries of ``name`` from ``first`` on."""
        start, _ = self.slots[name]
        return self.scale[start + first : start + first + count]

    def begin_step(self) -> None:
        self.amax.zero_()

    def end_step(self) -> None:
        if self.stage.size > 1:
            dist.all_reduce(self.amax, op=dist.ReduceOp.MAX, group=self.stage.group)
        self.history.copy_(self.history.roll(1, 1))
        self.history[:, 0] = self.amax
        amax = self.amax if self.most_recent else self.history.amax(1)
        scale = ((self.largest / amax) / 2.0**self.margin).clamp(max=FP32_MAX)
        # As in TE, a tensor that was all zeros or had an infinity keeps its scale.
        self.scale.copy_(torch.where((amax > 0) & amax.isfinite(), scale, self.scale))

    def state(self) -> dict[str, torch.Tensor]:
        state = {}
        for name, (start, count) in self.slots.items():
            state[f"{name}.amax_history"] = self.history[start : start + count]
            state[f"{name}.scale"] = self.scale[start : start + count]
        return state
