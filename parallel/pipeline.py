"""One training step over micro-batches, in one process or through torch.distributed.pipelining's schedules.

A stage module is called as ``part(x, **batch)``. The first stage takes FIRST_INPUT of the batch, each later stage takes the
hidden states of the stage before it, and the last stage's output goes to the loss. Losses are sums: nothing is divided here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import Node
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import construct_reverse_graph, get_param_groups, stage_backward

from parallel.mesh import Axis
from parallel.sequence import FIRST_INPUT, Batch
from parallel.stages import V_SHAPED

Loss = Callable[[torch.Tensor, Batch], torch.Tensor]

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,  # arXiv 2006.09503, 2104.04473
    "interleaved_1f1b": ScheduleInterleaved1F1B,  # arXiv 2104.04473
    "zbv": ScheduleZBVZeroBubble,  # arXiv 2401.10241
    "dualpipev": ScheduleDualPipeV,  # arXiv 2412.19437
}


def between_halves(output: torch.Tensor, given: torch.Tensor, weights: Iterable[nn.Parameter]) -> list[Node]:
    """The nodes of the graph from ``given`` to ``output`` whose gradients the first half of a backward keeps for the second,
    which goes on from them to ``weights``."""

    def node(tensor: torch.Tensor) -> Node:
        return torch.autograd.graph.get_gradient_edge(tensor).node

    edges = construct_reverse_graph([node(output)])
    groups = get_param_groups([node(given)], [node(weight) for weight in weights if weight.requires_grad], edges)
    return list({id(one): one for group in groups for one in group["intermediates"]}.values())


def _to_one_dtype(group: FSDPParamGroup) -> None:
    """Convert the unsharded gradients of ``group`` to the dtype of their reduction, if some of them have it.

    FSDP does so after a backward that it does not reduce, by a hook. Where a schedule splits backward in two (zbv),
    gradients of weights come after the hook, and FSDP refuses to reduce them together with those that were converted.
    """
    parameters = [parameter for parameter in group.fsdp_params if hasattr(parameter, "_unsharded_param")]
    if any(parameter.unsharded_accumulated_grad is not None for parameter in parameters):
        for parameter in parameters:
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


class _Stage(PipelineStage):
    """A stage that reduces gradients in one dtype: after its last micro-batch or, with ``reduce_every``, after each."""

    reduce_every = False

    def _groups(self) -> Iterator[FSDPParamGroup]:
        for state in fully_shard.state(self.submod)._state_ctx.all_states:  # type: ignore[attr-defined]
            if hasattr(state, "_fsdp_param_groups"):
                yield from state._fsdp_param_groups
            elif state._fsdp_param_group is not None:  # torch 2.11 has one
                yield state._fsdp_param_group

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], list[dict[str, Any]] | None]:
        """Torch's method never reduces here, only in `perform_reduce_grad`."""
        part = self.submod
        if not (self.reduce_every and isinstance(part, FSDPModule)) or backward_type == "input":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "full":
            # FSDP's hooks reduce each unit as soon as its gradients are there.
            part.set_is_last_backward(True)  # else a buffer of the reduction is kept for every stage of the rank
            part.set_reshard_after_backward(False)
            part.set_requires_gradient_sync(True)
            values = (bwd_kwargs[name] for name in ("stage_output", "output_grads", "input_values"))
            return stage_backward(*values), None
        # Gradients of weights that come apart from a backward: no hook reduces these.
        found = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        part.set_is_last_backward(True)
        part.set_requires_gradient_sync(True)
        for group in self._groups():
            _to_one_dtype(group)
            group.post_backward()
        fully_shard.state(part)._root_post_backward_final_callback()  # type: ignore[attr-defined]
        return found

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if isinstance(self.submod, FSDPModule):
            for group in self._groups():
                _to_one_dtype(group)
        super().perform_reduce_grad(grad_scale_factor)


class Sequential:
    """No pipeline: the whole model is one stage, and micro-batches run one after the other.

    ``keep_gathered``: parameters that FSDP gathers stay gathered from one micro-batch of a step to the next. This does not
    raise peak memory unless they are also dropped after forward (ZeRO-3), because every backward begins with all of them.
    ``reduce_every``: gradients are reduced after each micro-batch, not only after the last.
    """

    reduce_every = False

    def __init__(self, part: nn.Module, loss: Loss, keep_gathered: bool = False) -> None:
        self.part, self.loss, self.keep_gathered = part, loss, keep_gathered

    def forward_backward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Run and backpropagate all ``micro_batches``. Returns the detached losses."""
        losses = []
        for index, batch in enumerate(micro_batches):
            if isinstance(self.part, FSDPModule):
                last = index == len(micro_batches) - 1
                self.part.set_requires_gradient_sync(last or self.reduce_every)
                self.part.set_reshard_after_backward(last or not self.keep_gathered)
            loss = self.loss(self._run(batch), batch)
            loss.backward()
            losses.append(loss.detach())
        return losses

    def forward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The model's output for each micro-batch."""
        return [self._run(batch) for batch in micro_batches]

    def _run(self, batch: Batch) -> torch.Tensor:
        rest = {name: tensor for name, tensor in batch.items() if name != FIRST_INPUT}
        return self.part(batch[FIRST_INPUT], **rest)


@dataclass(frozen=True, kw_only=True)
class MicroBatchShapes:
    """Meta tensors of one micro-batch: the first stage's input, what travels between stages, and the last stage's output."""

    first: torch.Tensor
    hidden: torch.Tensor
    output: torch.Tensor


class Pipeline:
    """This rank's stages of a pipeline over ``axis``, run by one of `SCHEDULES`. All ranks of the axis step together.

    ``parts``: this rank's stage modules by stage. Every rank gets the same batches; hidden states travel between neighbors.
    """

    def __init__(
        self,
        parts: Mapping[int, nn.Module],
        num_stages: int,
        axis: Axis,
        schedule: str,
        *,
        micro_batches: int,
        shapes: MicroBatchShapes,
        loss: Loss,
        device: torch.device,
    ) -> None:
        self.parts, self.num_stages, self.axis, self.device = dict(parts), num_stages, axis, device
        self.hidden, self.loss = shapes.hidden, loss
        self.micro_batches, self.v_shaped = micro_batches, schedule in V_SHAPED
        self._running: Sequence[Batch] = ()
        assert axis.group is not None
        travelling, output = shapes.hidden.clone().requires_grad_(), shapes.output.clone().requires_grad_()
        self._stages = built = [
            _Stage(
                part,
                stage,
                num_stages,
                device,
                input_args=shapes.first if stage == 0 else travelling,
                output_args=output if stage == num_stages - 1 else travelling,
                group=axis.group,
            )
            for stage, part in self.parts.items()
        ]
        self.schedule = SCHEDULES[schedule](
            built[0] if schedule == "1f1b" else built,
            n_microbatches=micro_batches,
            loss_fn=self._loss_of,
            scale_grads=False,
        )

    def _loss_of(self, output: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """Schedules split one target tensor over micro-batches; ours holds the micro-batch's number."""
        return self.loss(output, self._running[int(number)])

    @property
    def reduce_every(self) -> bool:
        """Whether gradients are reduced after each micro-batch, not only after the last."""
        return self._stages[0].reduce_every

    @reduce_every.setter
    def reduce_every(self, value: bool) -> None:
        for stage in self._stages:
            stage.reduce_every = value

    @property
    def has_last(self) -> bool:
        return self.num_stages - 1 in self.parts

    def forward_backward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Run and backpropagate all ``micro_batches``. Returns the detached losses on the last stage's rank, else []."""
        assert len(micro_batches) == self.micro_batches
        whole = {name: torch.cat([batch[name] for batch in micro_batches]) for name in micro_batches[0]}
        first = whole.pop(FIRST_INPUT)
        losses: list[torch.Tensor] = []
        arguments = (first,) if 0 in self.parts else ()
        # On the CPU, so that reading a number does not synchronize with a GPU.
        numbers = torch.arange(self.micro_batches) if self.has_last else None
        self._running = micro_batches
        self.schedule.step(*arguments, target=numbers, losses=losses, return_outputs=False, **whole)
        self._running = ()
        return [loss.detach() for loss in losses]

    def forward(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Forward only, any number of micro-batches. Returns the outputs on the last stage's rank, else []."""
        results = []
        for batch in micro_batches:
            rest = dict(batch)
            x = rest.pop(FIRST_INPUT)
            for stage, part in self.parts.items():
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
