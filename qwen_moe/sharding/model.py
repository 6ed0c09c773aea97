"""The model as one rank trains it: its stage modules, the placement of their parameters, and which copies count."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from parallel.kernels.interface import Kernels
from parallel.mesh import Grids
from qwen_moe.config import ModelConfig, Recompute
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.head import Head
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.sharding.parallelize import parallelize
from qwen_moe.sharding.table import Placement


class Attach(Protocol):
    """``(part, out, router, labels, counted) -> out``: adds losses of the router's statistics to a stage's output."""

    def __call__(
        self,
        part: "TrainingPart",
        out: torch.Tensor,
        router: RouterStatistics,
        labels: torch.Tensor,
        counted: torch.Tensor | None,
        /,
    ) -> torch.Tensor: ...


class TrainingPart(DecoderLM):
    """A stage module: consecutive layers as training runs them. ``forward(x, labels, ...)`` returns hidden states; on the
    last stage it returns what ``head`` names: the summed cross-entropy ``[1]``, the labels' log-probabilities
    ``[B, S / parts]`` or scores by criterion ``[B, S / parts, C]``. ``attach`` receives the router statistics and may
    attach losses to the output."""

    head: Head = "cross_entropy"
    chunk_tokens = 1024
    attach: "Attach | None" = None
    around_forward: Callable[[], AbstractContextManager[Any]] = nullcontext

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
        experts: torch.Tensor | None = None,
        **for_the_loss: torch.Tensor,
    ) -> torch.Tensor:
        with self.around_forward():
            out, router = self.hidden_states(x, position_ids, document_starts, counted, experts)
        if self.last and self.head == "cross_entropy":
            out = torch.stack([self.cross_entropy(out, self.head_weight, labels, self.chunk_tokens)])
        elif self.last and self.head == "scores":
            out = self.scores(out)
        elif self.last:
            out = self.log_probs(
                out, self.head_weight, labels, self.chunk_tokens
            ).clone()  # not a view, about which FSDP warns
        if self.attach is not None and router is not None and torch.is_grad_enabled():
            out = self.attach(self, out, router, labels, counted)
        return out


@dataclass
class ParallelModel:
    """This rank's stage modules (several if the schedule interleaves) and the placement of their parameters.

    ``stages`` are the stage numbers of ``parts``, out of ``num_stages``. With tied embeddings the first and the last stage
    each hold a copy, even on the same rank. The gradients of the copies are summed, so that the copies stay equal.
    """

    config: ModelConfig
    grids: Grids
    parts: list[TrainingPart]
    stages: list[int]
    num_stages: int
    kernels: Kernels
    placements: dict[str, Placement] = field(default_factory=dict)

    def use_head(self, head: Head) -> None:
        """Choose the last stage's output. Call it before an engine is built for the model."""
        assert (head == "scores") == bool(self.config.criteria), (head, self.config.criteria)
        for part in self.parts:
            part.head = head

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of every stage module. A tied copy shares its original's name and is yielded after it."""
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for part in self.parts:
            yield from part.named_buffers()

    def modules(self) -> Iterator[nn.Module]:
        for part in self.parts:
            yield from part.modules()

    @property
    def tied_apart(self) -> bool:
        """Whether the embedding and the head are one parameter that two stages hold."""
        return self.config.tied_head and self.num_stages > 1

    def counts_in_norm(self, name: str, stage: int) -> bool:
        """Whether this rank's copy is the one that the global norm counts."""
        if self.tied_apart and name == "model.embed_tokens.weight" and stage > 0:
            return False
        return all(axis.index == 0 for axis in self.placements[name].replicas)

    def range_of(self, name: str, parameter: torch.Tensor) -> tuple[list[int], list[int]]:
        """(offsets, sizes) of this rank's shard within the whole parameter, after FSDP has cut it."""
        place = self.placements[name]
        offsets, sizes = list(place.offsets), list(place.sizes)
        # Between a forward and its backward, FSDP exposes the gathered parameter, which is not the optimizer's.
        assert isinstance(parameter, DTensor), f"{name} is gathered: call `reshard` first"
        mesh, (cut,) = parameter.device_mesh, parameter.placements
        assert isinstance(cut, Shard), (name, cut)
        chunk = -(-sizes[cut.dim] // mesh.size())
        first = min(sizes[cut.dim], mesh.get_local_rank() * chunk)
        offsets[cut.dim], sizes[cut.dim] = offsets[cut.dim] + first, min(sizes[cut.dim] - first, chunk)
        assert parameter.to_local().shape[cut.dim] == sizes[cut.dim], name
        return offsets, sizes

    def reshard(self) -> None:
        """Free gathered parameters that a forward without a backward has left."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def build_parts(
    config: ModelConfig,
    grids: Grids,
    layers: Sequence[Sequence[int]],
    stages: Iterable[int],
    *,
    recompute: Recompute,
    dtype: torch.dtype,
    kernels: Kernels,
    plain_layers: Collection[int] = (),
) -> ParallelModel:
    """The stage modules ``stages`` on the meta device, cut to this rank's shards. ``layers[s]`` are the layers of stage s.
    ``kernels`` supplies matmuls and norms, except in ``plain_layers``."""
    stages = list(stages)
    parts = []
    with torch.device("meta"):
        for stage in stages:
            parts.append(TrainingPart(config, recompute=recompute, layers=layers[stage]).to(dtype))
    placements: dict[str, Placement] = {}
    for part in parts:
        part.around_forward = kernels.forward
        placements |= parallelize(part, grids, kernels, plain_layers)
    return ParallelModel(config, grids, parts, stages, len(layers), kernels, placements)
