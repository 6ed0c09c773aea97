"""Layers -> stages -> ranks, and a step over micro-batches through torch.distributed.pipelining's schedules.

A part of the model is a module ``part(x, **batch)``: the first takes a tensor of the batch, the others the hidden states
that the part before gave; the last gives what the loss function takes. Losses are sums: nothing is divided here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from parallel.mesh import Axis, LayoutError

Batch = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor], torch.Tensor]

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,  # arXiv 2006.09503, 2104.04473
    "interleaved_1f1b": ScheduleInterleaved1F1B,  # arXiv 2104.04473
    "zbv": ScheduleZBVZeroBubble,  # arXiv 2401.10241
    "dualpipev": ScheduleDualPipeV,  # arXiv 2412.19437
}
V_SHAPED = ("zbv", "dualpipev")


def stages_per_rank(schedule: str, asked: int = 0) -> int:
    """Stages on each rank: what was ``asked`` for, or (0) the schedule's own number."""
    return asked or (1 if schedule == "1f1b" else 2)


def check_schedule(schedule: str, pp: int, per_rank: int, micro_batches: int, layers: int) -> None:
    """Raise LayoutError unless ``schedule`` can run ``micro_batches`` through ``pp * per_rank`` stages of ``layers``."""
    stages = pp * per_rank
    if schedule == "1f1b" and per_rank != 1:
        raise LayoutError(
            f"schedule 1f1b has one stage per rank, not {per_rank}: use interleaved_1f1b, or leave it out"
        )
    if schedule == "interleaved_1f1b" and per_rank < 2:
        raise LayoutError("schedule interleaved_1f1b needs at least 2 stages per rank: use 1f1b for one")
    if schedule in V_SHAPED and per_rank != 2:
        raise LayoutError(f"schedule {schedule} has exactly 2 stages per rank, not {per_rank}: leave it out")
    if layers < stages:
        raise LayoutError(
            f"{layers} layers cannot fill pp {pp} x {per_rank} stages per rank = {stages} stages: lower one of the two"
        )
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
    if micro_batches < least:
        raise LayoutError(
            f"schedule {schedule} with pp {pp} needs at least {least} micro-batches per step and data-parallel rank, not "
            f"{micro_batches}: raise the global batch, or lower the micro-batch size, pp or dp"
        )
    rounds = max(1, micro_batches // pp)
    if schedule == "interleaved_1f1b" and micro_batches % rounds:
        raise LayoutError(
            f"schedule interleaved_1f1b with pp {pp} runs {micro_batches} micro-batches in {rounds} rounds, which must "
            "divide them: choose a multiple of pp"
        )


def split_layers(costs: Sequence[float], num_stages: int, first: float = 0.0, last: float = 0.0) -> list[list[int]]:
    """Layers of each stage, consecutive and never none, such that the costliest stage is as cheap as can be.

    ``costs`` per layer; ``first`` and ``last`` are what the first stage (embedding) and the last (norm, head, loss) do
    besides. Among such splits, the one with the least sum of squared stage costs. Exact, by dynamic programming.
    """
    layers = len(costs)
    assert 1 <= num_stages <= layers
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    def cost_of(stage: int, begin: int, end: int) -> float:
        return prefix[end] - prefix[begin] + first * (stage == 0) + last * (stage == num_stages - 1)

    def best(objective: Callable[[float, float], float], limit: float) -> list[int]:
        """First layers of stages 1, 2, ... and the end, minimising ``objective`` folded over the stages' costs."""
        table: dict[tuple[int, int], tuple[float, list[int]]] = {(num_stages, layers): (0.0, [])}
        for stage in range(num_stages - 1, -1, -1):
            for begin in range(stage, layers - (num_stages - stage) + 1):
                found = [
                    (objective(cost_of(stage, begin, end), table[stage + 1, end][0]), [end, *table[stage + 1, end][1]])
                    for end in range(begin + 1, layers + 1)
                    if (stage + 1, end) in table and cost_of(stage, begin, end) <= limit
                ]
                if found:
                    table[stage, begin] = min(found)
        return table[0, 0][1]

    ends = best(max, math.inf)
    peak = max(cost_of(s, begin, end) for s, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)))
    ends = best(lambda cost, rest: cost * cost + rest, peak * (1 + 1e-12))
    return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]


def stages_of_rank(schedule: str, pp: int, per_rank: int, rank: int) -> list[int]:
    """Stages that pipeline rank ``rank`` holds, in order: looped, or V-shaped (the first and the last meet on rank 0)."""
    if schedule in V_SHAPED:
        return [rank, 2 * pp - 1 - rank]
    return [rank + pp * turn for turn in range(per_rank)]


class Sequential:
    """No pipeline: the whole model is one part, and micro-batches are run one after the other."""

    def __init__(self, part: nn.Module, first_input: str, loss: Loss) -> None:
        self.part, self.first_input, self.loss = part, first_input, loss

    def forward_backward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Run and backpropagate all ``micro_batches``; gradients are reduced with the last. Their losses, detached."""
        losses = []
        for index, batch in enumerate(micro_batches):
            if isinstance(self.part, FSDPModule):
                self.part.set_requires_gradient_sync(index == len(micro_batches) - 1)
            loss = self.loss(self._run(batch))
            loss.backward()
            losses.append(loss.detach())
        return losses

    def forward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """What the last part gives for each micro-batch."""
        return [self._run(batch) for batch in micro_batches]

    def _run(self, batch: Batch) -> torch.Tensor:
        rest = {name: tensor for name, tensor in batch.items() if name != self.first_input}
        return self.part(batch[self.first_input], **rest)


class Pipeline:
    """This rank's stages of a pipeline over ``axis``, run by one of `SCHEDULES`. All ranks of the axis step together.

    ``hidden``: shape and dtype, as a meta tensor, of what travels between stages for one micro-batch. Every rank is given
    the same batches; hidden states travel between neighbours.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        stages: Sequence[int],
        num_stages: int,
        axis: Axis,
        schedule: str,
        *,
        micro_batches: int,
        hidden: torch.Tensor,
        sequence_length: int,
        first_input: str,
        loss: Loss,
        loss_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parts, self.stages, self.num_stages = list(parts), list(stages), num_stages
        self.axis, self.hidden, self.first_input, self.device = axis, hidden, first_input, device
        self.micro_batches, self.v_shaped = micro_batches, schedule in V_SHAPED
        assert axis.group is not None
        travelling = hidden.clone().requires_grad_()
        built = []
        for part, stage in zip(parts, stages, strict=True):
            ids = torch.empty(hidden.shape[0], sequence_length, dtype=torch.int64, device="meta")
            out = torch.empty(1, dtype=loss_dtype, device="meta", requires_grad=True)
            built.append(
                PipelineStage(
                    part,
                    stage,
                    num_stages,
                    device,
                    input_args=ids if stage == 0 else travelling,
                    output_args=out if stage == num_stages - 1 else travelling,
                    group=axis.group,
                )
            )
        self.schedule = SCHEDULES[schedule](
            built[0] if schedule == "1f1b" else built,
            n_microbatches=micro_batches,
            loss_fn=lambda output, target: loss(output),
            scale_grads=False,
        )

    @property
    def has_last(self) -> bool:
        return self.num_stages - 1 in self.stages

    def forward_backward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Run and backpropagate all ``micro_batches``. Losses, detached, where the last stage is; elsewhere none."""
        assert len(micro_batches) == self.micro_batches
        whole = {name: torch.cat([batch[name] for batch in micro_batches]) for name in micro_batches[0]}
        first = whole.pop(self.first_input)
        losses: list[torch.Tensor] = []
        arguments = (first,) if 0 in self.stages else ()
        self.schedule.step(
            *arguments, target=first if self.has_last else None, losses=losses, return_outputs=False, **whole
        )
        return [loss.detach() for loss in losses]

    def forward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Forward only, any number of micro-batches: what the last part gives, where it is; elsewhere nothing."""
        results = []
        for batch in micro_batches:
            rest = dict(batch)
            x = rest.pop(self.first_input)
            for part, stage in zip(self.parts, self.stages, strict=True):
                if stage > 0:
                    x = self._receive(stage - 1, x)
                x = part(x, **rest)
                if stage == self.num_stages - 1:
                    results.append(x)
                else:
                    self._send(stage + 1, x)
        return results

    def _rank_of(self, stage: int) -> int:
        if self.v_shaped and stage >= self.axis.size:
            return 2 * self.axis.size - 1 - stage
        return stage % self.axis.size

    def _send(self, stage: int, x: torch.Tensor) -> None:
        rank = self._rank_of(stage)
        assert self.axis.group is not None
        if rank != self.axis.index:
            dist.send(x.contiguous(), dist.get_global_rank(self.axis.group, rank), group=self.axis.group)

    def _receive(self, stage: int, mine: torch.Tensor) -> torch.Tensor:
        rank = self._rank_of(stage)
        assert self.axis.group is not None
        if rank == self.axis.index:
            return mine
        x = torch.empty(self.hidden.shape, dtype=self.hidden.dtype, device=self.device)
        dist.recv(x, dist.get_global_rank(self.axis.group, rank), group=self.axis.group)
        return x
