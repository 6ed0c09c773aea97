"""Layers -> stages -> ranks, and a step over micro-batches through torch.distributed.pipelining's schedules.

A part of the model is a module ``part(x, **batch)``: the first takes a tensor of the batch, the others the hidden states
that the part before gave; the last gives what the loss function takes. Losses are sums: nothing is divided here.
"""

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

from parallel.mesh import Axis
from parallel.stages import V_SHAPED

Batch = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor], torch.Tensor]

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,  # arXiv 2006.09503, 2104.04473
    "interleaved_1f1b": ScheduleInterleaved1F1B,  # arXiv 2104.04473
    "zbv": ScheduleZBVZeroBubble,  # arXiv 2401.10241
    "dualpipev": ScheduleDualPipeV,  # arXiv 2412.19437
}


class Sequential:
    """No pipeline: the whole model is one part, and micro-batches are run one after the other.

    ``keep_gathered``: parameters that FSDP gathers stay whole from one micro-batch of a step to the next. The peak of memory
    is the same unless they are dropped after forward too (ZeRO-3): every backward begins with all of them.
    """

    def __init__(self, part: nn.Module, first_input: str, loss: Loss, keep_gathered: bool = False) -> None:
        self.part, self.first_input, self.loss, self.keep_gathered = part, first_input, loss, keep_gathered

    def forward_backward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Run and backpropagate all ``micro_batches``; gradients are reduced with the last. Their losses, detached."""
        losses = []
        for index, batch in enumerate(micro_batches):
            if isinstance(self.part, FSDPModule):
                last = index == len(micro_batches) - 1
                self.part.set_requires_gradient_sync(last)
                self.part.set_reshard_after_backward(last or not self.keep_gathered)
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
