"""How every parameter is split over the ranks, and the swap of modules that makes a part of the model parallel.

The table below is the whole plan. Applying it happens on the meta device: no rank ever holds a whole model.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.expert import Exchange, reorder
from parallel.kernels.interface import ExpertPart, Kernels, swap
from parallel.mesh import Axis, Grids, Layout, LayoutError
from parallel.tensor import VocabParallelEmbedding, gather_prefix, local_shape, split_range
from parallel.vocab_head import vocab_parallel_cross_entropy
from qwen_moe.config import ModelConfig
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.norm import RMSNorm
from qwen_moe.models.ops.permute import Permutation, combine, permute, sort_by_expert

# Parameter path -> {dim: axis it is split over}. Axes are attributes of Grids. What is not listed is whole on every
# rank. `kv` is tp, or the part of it that holds different KV heads where tp exceeds their number.
SPLITS: dict[str, dict[int, str]] = {
    "model.embed_tokens.weight": {0: "tp"},
    "lm_head.weight": {0: "tp"},
    "*.self_attn.q_proj.*": {0: "tp"},
    "*.self_attn.[kv]_proj.*": {0: "kv"},
    "*.self_attn.o_proj.weight": {1: "tp"},
    "*.gate_proj.weight": {0: "tp"},
    "*.up_proj.weight": {0: "tp"},
    "*.down_proj.weight": {1: "tp"},
    "*.mlp.experts.gate_up_proj": {0: "ep", 2: "etp"},
    "*.mlp.experts.down_proj": {0: "ep", 2: "etp"},
}


@dataclass(frozen=True)
class Placement:
    """Where one parameter lies. ``replicas`` are the axes on which whole copies exist whose gradients are partial (their
    inputs are split over it): they are summed once per step."""

    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]  # of this rank's part, before FSDP cuts its dim 0
    sizes: tuple[int, ...]
    replicas: tuple[Axis, ...]
    is_expert: bool


def is_expert(name: str) -> bool:
    """True for the stacked weights of routed experts, which live on the expert grid."""
    return ".mlp.experts." in name


def placement(name: str, shape: Sequence[int], grids: Grids) -> Placement:
    """The placement of parameter ``name`` of (whole) ``shape`` on this rank."""
    matching = [split for pattern, split in SPLITS.items() if fnmatch.fnmatchcase(name, pattern)]
    assert len(matching) <= 1, name
    splits = {dim: getattr(grids, axis) for dim, axis in matching[0].items()} if matching else {}
    offsets, sizes = local_shape(shape, splits)
    replicas: tuple[Axis, ...] = ()
    if not is_expert(name):
        axes = [axis.name for axis in splits.values()]
        whole = grids.kv_replica if axes == ["kv"] else None if axes else grids.tp
        replicas = (whole,) if whole is not None and whole.size > 1 else ()
    return Placement(tuple(shape), tuple(offsets), tuple(sizes), replicas, is_expert(name))


def check_layout(config: ModelConfig, layout: Layout, sequence_length: int) -> None:
    """Raise LayoutError, naming every size that does not divide, unless the model can be split as ``layout`` asks."""
    tp, ep, etp = layout.tp, layout.ep, layout.etp
    problems = []

    def need(what: str, size: int, axis: str, degree: int) -> None:
        if size % degree:
            problems.append(f"{what} {size} is not a multiple of {axis} {degree}")

    if layout.cp > 1:
        problems.append(
            f"cp is {layout.cp}, but context-parallel attention is not implemented yet: use tp for long sequences"
        )
    need("model.num_attention_heads", config.num_attention_heads, "tp", tp)
    kv = config.num_key_value_heads
    if kv % tp and tp % kv:
        problems.append(f"model.num_key_value_heads {kv} and tp {tp}: one must be a multiple of the other")
    need("data.sequence_length", sequence_length, "tp", tp)
    if config.vocab_size < tp:
        problems.append(f"model.vocab_size {config.vocab_size} is smaller than tp {tp}")
    if len(config.moe_layers) < config.num_hidden_layers:
        need("model.intermediate_size", config.intermediate_size, "tp", tp)
    if config.is_moe_family:
        need("model.num_experts", config.num_experts, "ep", ep)
        need("model.moe_intermediate_size", config.moe_intermediate_size, "etp", etp)
        if config.shared_expert_intermediate_size:
            need("model.shared_expert_intermediate_size", config.shared_expert_intermediate_size, "tp", tp)
    elif ep * etp > 1:
        problems.append(f"ep {ep} x etp {etp} split experts, but the model is dense: leave them at 1")
    if problems:
        raise LayoutError("; ".join(problems))


class AllToAllDispatcher:
    """Sends each choice to the ranks that hold its expert and brings the results back; ``overlap`` runs in between.

    Rows sorted by expert are sorted by destination too. With etp, each row goes to every rank that holds a slice of its
    expert and the partial results are summed by `combine` (a token then has K * etp rows).
    """

    def __init__(self, grids: Grids, num_experts: int) -> None:
        self.num_experts, self.etp = num_experts, grids.etp.size
        self.exchange = Exchange(grids.exchange, grids.etp.size, num_experts)

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        experts: Experts,
        overlap: Callable[[], torch.Tensor | None],
        drops: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        order = sort_by_expert(indices, self.num_experts + drops)
        counts = order.counts[: self.num_experts]
        kept = indices.numel() - int(order.counts[-1]) if drops else indices.numel()
        plan = self.exchange.plan(counts, kept)
        total = order.token.numel() * self.etp
        if self.etp > 1:
            order = self._copies(order, plan.send)
            weights = weights.repeat_interleave(self.etp, dim=1)
        sent = sum(plan.send)
        token = self.exchange.start(permute(x, order)[:sent], plan)
        beside = overlap()
        arrived = self.exchange.finish(token, plan)
        outputs = experts(reorder(arrived, plan.by_expert, plan.arrival), plan.counts)
        rows = self.exchange.send_back(reorder(outputs, plan.arrival, plan.by_expert), plan)
        if sent < total:  # dropped choices stay zero
            rows = nn.functional.pad(rows, (0, 0, 0, total - sent))
        return combine(rows, weights, order), beside

    def _copies(self, order: Permutation, send: list[int]) -> Permutation:
        """The order of rows when the rows of each ep destination are repeated for its etp ranks; dropped rows last."""
        etp, device = self.etp, order.token.device
        sizes = [*send[::etp], order.token.numel() - sum(send[::etp])]
        position = torch.arange(order.token.numel(), device=device)
        source = torch.cat([part.repeat(etp) for part in position.split(sizes)])
        # Copy c of a row lies c blocks after where its block begins.
        block = torch.repeat_interleave(
            torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device), output_size=position.numel()
        )
        begin = torch.tensor([0, *sizes], device=device).cumsum(0)
        size = torch.tensor(sizes, device=device)
        first = position + begin[block] * (etp - 1)
        copies = first.unsqueeze(1) + torch.arange(etp, device=device) * size[block].unsqueeze(1)
        return Permutation(order.token[source], copies[order.row].flatten(1), order.counts)


class TrainingPart(DecoderLM):
    """A consecutive part of the model as training runs it: ``forward(x, labels, ...) -> hidden states, or the summed
    cross-entropy [1] of the last part``. ``attach`` gets the routers' statistics and may tie losses to the output."""

    chunk_tokens = 1024
    attach: Callable[..., torch.Tensor] | None = None
    around_forward: Callable[[], AbstractContextManager[Any]] = nullcontext

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with self.around_forward():
            out, router = self.hidden_states(x, position_ids, document_ids)
        if self.last:
            out = torch.stack([self.cross_entropy(out, self.head_weight, labels, self.chunk_tokens)])
        if self.attach is not None and router is not None and torch.is_grad_enabled():
            out = self.attach(self, out, router, labels)
        return out


def _ask_for_kernels(path: str, module: nn.Module, kernels: Kernels, grids: Grids) -> None:
    """Let ``kernels`` supply the products and norms of one block. Router, embedding and head are never asked for."""
    if isinstance(module, Attention):
        module.project = kernels.column(path, module, ("q_proj", "k_proj", "v_proj")) or module.project
        kernels.row(path, module, "o_proj")
    elif isinstance(module, FeedForward):
        module.project = kernels.column(path, module, ("gate_proj", "up_proj")) or module.project
        kernels.row(path, module, "down_proj")
    elif isinstance(module, Experts):
        total = module.down_proj.shape[0]
        first, count = split_range(total, grids.ep)
        experts = ExpertPart(total=total, first=first, count=count)
        module.up_mm = kernels.grouped(f"{path}.gate_up_proj", experts) or module.up_mm
        module.down_mm = kernels.grouped(f"{path}.down_proj", experts) or module.down_mm
    for name, child in list(module.named_children()):
        if isinstance(child, RMSNorm):
            kernels.norm(path, module, name)


def parallelise(part: DecoderLM, grids: Grids, kernels: Kernels, plain_layers: Collection[int]) -> dict[str, Placement]:
    """Cut ``part`` (on the meta device) to this rank's share and swap in parallel modules, with products by ``kernels``
    but in ``plain_layers``. Placements by parameter name."""
    config, tp = part.config, grids.tp
    placements = {name: placement(name, p.shape, grids) for name, p in part.named_parameters()}
    if tp.size > 1:
        part.sequence_parts = tp.size
        if hasattr(part.model, "embed_tokens"):
            embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, device="meta")
            embedding.axis, embedding.first = tp, placements["model.embed_tokens.weight"].offsets[0]
            swap(part.model, "embed_tokens", embedding)
        if part.last:
            head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            part.cross_entropy = partial(vocab_parallel_cross_entropy, first=placements[head].offsets[0], axis=tp)
    plain = Kernels(tp)
    for layer in part.model.layers:
        index = layer.self_attn.layer
        chosen = plain if index in plain_layers else kernels
        for name, module in list(layer.named_modules(prefix=f"model.layers.{index}")):
            _ask_for_kernels(name, module, chosen, grids)
            if isinstance(module, MoE):
                if tp.size > 1:
                    module.sequence_parts = tp.size
                    module.earlier_counts = partial(gather_prefix, axis=tp)
                if grids.exchange.size > 1:
                    module.dispatcher = AllToAllDispatcher(grids, config.num_experts)
    for name, place in placements.items():
        path, _, leaf = name.rpartition(".")
        module = part.get_submodule(path)
        old = module.get_parameter(leaf)
        setattr(module, leaf, nn.Parameter(torch.empty(place.sizes, dtype=old.dtype, device="meta")))
    return placements


@dataclass
class ParallelModel:
    """This rank's parts of the model (more than one where the schedule interleaves) and where their parameters lie.

    ``stages`` are the parts' places among all ``num_stages``. With tied embeddings the first and the last stage hold a
    copy each, also where both are on this rank; their gradients are summed, so that the copies stay equal.
    """

    config: ModelConfig
    grids: Grids
    parts: list[TrainingPart]
    stages: list[int]
    num_stages: int
    kernels: Kernels
    placements: dict[str, Placement] = field(default_factory=dict)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of every part; a twin has the name of its original, which comes first."""
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
        """True when the embedding and the head are one parameter held by two stages."""
        return self.config.tie_word_embeddings and self.num_stages > 1

    def counts_in_norm(self, name: str, stage: int) -> bool:
        """Whether this rank's copy is the one that the global norm counts."""
        if self.tied_apart and name == "model.embed_tokens.weight" and stage > 0:
            return False
        return all(axis.index == 0 for axis in self.placements[name].replicas)

    def range_of(self, name: str, parameter: torch.Tensor) -> tuple[list[int], list[int]]:
        """(offsets, sizes) in the whole parameter of what this rank stores of it after FSDP's cut of dim 0."""
        place = self.placements[name]
        offsets, sizes = list(place.offsets), list(place.sizes)
        # FSDP shows the gathered parameter, which is not the optimizer's, between a forward and its backward.
        assert isinstance(parameter, DTensor), f"{name} is gathered: call `reshard` first"
        mesh = parameter.device_mesh
        chunk = -(-sizes[0] // mesh.size())
        first = min(sizes[0], mesh.get_local_rank() * chunk)
        offsets[0], sizes[0] = offsets[0] + first, min(sizes[0] - first, chunk)
        assert parameter.to_local().shape[0] == sizes[0], name
        return offsets, sizes

    def reshard(self) -> None:
        """Let go of gathered parameters that a forward without a backward has left."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def build_parts(
    config: ModelConfig,
    grids: Grids,
    layers: Sequence[Sequence[int]],
    stages: Iterable[int],
    *,
    recompute: bool,
    dtype: torch.dtype,
    kernels: Kernels,
    plain_layers: Collection[int] = (),
) -> ParallelModel:
    """The parts ``stages`` of the model on the meta device, cut to this rank's share. ``layers[s]`` are those of stage s;
    products are by ``kernels`` but in ``plain_layers``."""
    stages = list(stages)
    parts = []
    with torch.device("meta"):
        for stage in stages:
            parts.append(TrainingPart(config, recompute=recompute, layers=layers[stage]).to(dtype))
    placements: dict[str, Placement] = {}
    for part in parts:
        part.around_forward = kernels.forward
        placements |= parallelise(part, grids, kernels, plain_layers)
    return ParallelModel(config, grids, parts, stages, len(layers), kernels, placements)
