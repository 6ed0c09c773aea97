"""Delayed scaling (arXiv 2209.05433; TE's DelayedScaling): each tensor's scale comes from its largest values of earlier
steps, which all ranks that hold a part of the tensor share."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from parallel.kernels.formats import FP32_MAX, LARGEST
from parallel.mesh import Axis


@dataclass
class DelayedScaling:
    """Scales of named tensors of this rank's layers, in one flat table; a stacked tensor has one for each expert.

    Each step: largest values are noted while ``scale`` stays as it is, and `end_step` takes their maximum over ``stage``,
    appends it to the history of ``length`` steps and sets the next step's scale, ``LARGEST / max(history) / 2^margin``
    (``most_recent``: of the newest entry). Noting one tensor twice (a recomputed forward) changes nothing.

    Why ``stage``: a dense tensor's parts lie on tp ranks (features or sequence), cp and dp ranks (tokens). An expert's
    rows lie on edp ranks, its features on etp ranks, and ep ranks hold other experts: each notes its own at their places
    among all experts and 0 elsewhere, which no maximum sees. All of these are the ranks with this rank's layers, so one
    all-reduce over them serves both kinds. Pipeline ranks hold other tensors under the same places of the table: never
    over pp. TE shares the group (`amax_reduction_group`) but reduces after each forward and backward; here it is once a
    step, so that no schedule and no number of micro-batches changes a scale within it.
    """

    stage: Axis
    length: int
    most_recent: bool
    margin: int
    slots: dict[str, tuple[int, int]] = field(default_factory=dict)
    formats: list[torch.dtype] = field(default_factory=list)

    def add(self, name: str, fp8: torch.dtype, count: int = 1) -> None:
        """A tensor, or ``count`` of them under one name."""
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
        """The largest values ``amax []`` or ``[E]`` of ``name``, of its entries from ``first`` on."""
        start, _ = self.slots[name]
        own = self.amax[start + first : start + first + amax.numel()]
        torch.maximum(own, amax.reshape(-1), out=own)

    def scales(self, name: str, first: int = 0, count: int = 1) -> torch.Tensor:
        """``[count]`` scales of this step."""
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
        # TE: a tensor that was all zeros, or had an infinity, keeps its scale.
        self.scale.copy_(torch.where((amax > 0) & amax.isfinite(), scale, self.scale))

    def state(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, (start, count) in self.slots.items():
            found[f"{name}.amax_history"] = self.history[start : start + count]
            found[f"{name}.scale"] = self.scale[start : start + count]
        return found
