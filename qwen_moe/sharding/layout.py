"""The layout of a recipe on a number of processes. All checks that sizes and degrees fit happen here, before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from launchers.counted import counted
from parallel.mesh import Layout, LayoutError, layout_for, smallest_world
from parallel.stages import check_schedule, split_layers, stages_per_rank
from qwen_moe.config import ModelConfig, RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.flops import layer_costs

CpKind = Literal["ring", "all_gather"]

_GATHERED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """How attention reaches other ranks' keys: groups of ``heads`` neighboring cp ranks exchange tokens for heads, and
    between the groups keys and values travel by ``kind``."""

    kind: CpKind = "all_gather"
    heads: int = 1

    def text(self, cp: int) -> str:
        if self.heads == cp:
            return "ulysses"
        return self.kind + (f", ulysses over {self.heads}" if self.heads > 1 else "")

    def settings(self, cp: int) -> dict[str, Any]:
        """The keys of the ``parallel`` section that choose this plan."""
        if self.heads == cp > 1:
            return {"cp_kind": "ulysses", "cp_ulysses": 1}
        return {"cp_kind": self.kind, "cp_ulysses": self.heads}


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """The degrees of a run, how its context parallelism works, and the layers of each pipeline stage."""

    layout: Layout
    context: ContextPlan = ContextPlan()
    layers: tuple[tuple[int, ...], ...]  # by stage
    per_rank: int  # stages per pipeline rank
    micro_batches: int  # per step and data-parallel rank


def _degrees(config: RunConfig) -> dict[str, int]:
    parallel = config.parallel
    return {name: getattr(parallel, name) for name in ("pp", "cp", "tp", "ep", "etp")}


def processes(config: RunConfig, gpus: int = 0) -> int:
    """Processes to start on this machine: ``launch.nproc``, or the next larger number that the layout divides. With ``gpus``
    above 0, at most one process per GPU. Raises UserError if the layout needs more."""
    degrees = _degrees(config)
    count = smallest_world(config.launch.nproc, **degrees)
    if not gpus or count <= gpus:
        return count
    for fewer in range(gpus, 0, -1):
        if smallest_world(fewer, **degrees) == fewer:
            return fewer
    raise UserError(
        f"parallel: this layout needs {counted(smallest_world(1, **degrees), 'process')}, each with its own GPU, and "
        "this machine has "
        f"{gpus}: lower the degrees of the parallel section, launch it on more nodes, or set CUDA_VISIBLE_DEVICES= to train "
        "on the CPU"
    )


def context_plan(config: RunConfig, layout: Layout) -> ContextPlan:
    """How ``parallel.cp_kind`` and ``cp_ulysses`` split attention over ``layout.cp`` ranks. Raises LayoutError.

    ``auto``: whichever sends fewer bytes, an exchange of heads (where the heads can be split) or the keys and values; these
    by all-gather while one layer's are below `_GATHERED_BYTES`, else by a ring.
    """
    cp, parallel, model = layout.cp, config.parallel, config.model
    kind, heads = parallel.cp_kind, parallel.cp_ulysses
    _check_ulysses(kind, heads, cp)
    kv = max(1, model.num_key_value_heads // layout.tp)
    per_rank = model.num_attention_heads // layout.tp

    def splits(degree: int) -> bool:
        return per_rank % degree == 0 and (kv % degree == 0 or degree % kv == 0)

    # Forward and backward in bf16, and gradients of keys and values in float32; in units of S x C x (n - 1) / n.
    keys, exchanged = 16 * kv, 8 * (per_rank + max(kv, cp)) / cp
    if kind == "ulysses" or (kind == "auto" and splits(cp) and exchanged < keys):
        kind, heads = "all_gather", cp  # of one rank: nothing is gathered
    if not splits(heads):
        raise LayoutError(
            f"an exchange of heads over {counted(heads, 'rank')} "
            f"({'cp_kind ulysses' if heads == cp else f'cp_ulysses {heads}'}): with "
            f"tp {layout.tp} a rank has {per_rank} of model.num_attention_heads and {kv} of num_key_value_heads; the former "
            f"must be a multiple of {heads}, the latter a multiple or a divisor. Use cp_kind ring or all_gather"
            + (", or a smaller cp_ulysses" if heads < cp else "")
        )
    if kind == "auto":
        gathered = 4 * kv * model.head_dim * config.data.sequence_length * config.training.micro_batch_size
        kind = "ring" if gathered > _GATHERED_BYTES else "all_gather"
    return ContextPlan(kind=kind, heads=heads)


def _check_ulysses(kind: str, heads: int, cp: int) -> None:
    if heads == 1:
        return
    within = [degree for degree in range(2, cp) if cp % degree == 0]
    fix = f"use {' or '.join(map(str, within))}, or leave it out" if within else "leave it out"
    if kind not in ("ring", "all_gather"):
        raise LayoutError(
            f"cp_ulysses {heads} with cp_kind {kind}: it says how many ranks exchange heads inside a ring or all-gather; "
            "set cp_kind to ring or all_gather, or leave cp_ulysses out"
        )
    if heads == cp:
        raise LayoutError(
            f"cp_ulysses {heads} is all of cp {cp}: for heads alone, set cp_kind to ulysses and leave it out"
        )
    if cp % heads:
        raise LayoutError(f"cp_ulysses {heads} does not divide cp {cp}: {fix}")


def check_layout(config: ModelConfig, layout: Layout, sequence_length: int) -> None:
    """Raise LayoutError, naming every size that does not divide, unless ``layout`` can split the model."""
    tp, ep, etp = layout.tp, layout.ep, layout.etp
    problems = []

    def need(what: str, size: int, axis: str, degree: int) -> None:
        if size % degree:
            problems.append(f"{what} {size} is not a multiple of {axis} {degree}")

    need("model.num_attention_heads", config.num_attention_heads, "tp", tp)
    kv = config.num_key_value_heads
    if kv % tp and tp % kv:
        problems.append(f"model.num_key_value_heads {kv} and tp {tp}: one must be a multiple of the other")
    if layout.cp == 1:
        need("data.sequence_length", sequence_length, "tp", tp)
    elif sequence_length % (unit := 2 * layout.cp * tp):
        below = sequence_length // unit * unit
        fit = f"{below} or {below + unit}" if below else f"{unit}"
        problems.append(
            f"data.sequence_length {sequence_length} is not a multiple of 2 x cp {layout.cp} x tp {tp} = {unit}: use "
            f"{fit}, or lower a degree"
        )
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


def check_overlap(config: RunConfig, layout: Layout) -> None:
    """Raise LayoutError if ``parallel.ep_overlap`` is set where it can hide nothing."""
    if not config.parallel.ep_overlap:
        return
    rows = config.training.micro_batch_size
    if not config.model.is_moe_family:
        raise LayoutError("ep_overlap hides the way to experts, but the model is dense: leave it out")
    if layout.ep * layout.etp == 1:
        raise LayoutError(
            "ep_overlap hides the way to experts on other ranks, but ep and etp are 1: leave it out, or raise ep"
        )
    if rows % 2:
        raise LayoutError(
            f"ep_overlap splits a micro-batch into two halves, but training.micro_batch_size is {rows}: use an even "
            f"number such as {rows + 1}, or leave it out"
        )


def run_layout(config: RunConfig, world_size: int) -> RunLayout:
    """The layout of ``config`` on ``world_size`` processes. Raises UserError naming every factor that does not fit."""
    parallel, training, model = config.parallel, config.training, config.model
    try:
        layout = layout_for(world_size, **_degrees(config))
        check_layout(model, layout, config.data.sequence_length)
        context = context_plan(config, layout)
        check_overlap(config, layout)
    except LayoutError as error:
        raise UserError(f"parallel: {error}") from None
    samples_at_once = training.micro_batch_size * layout.dp
    if training.global_batch_size % samples_at_once:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x {layout.dp} data-parallel processes = {samples_at_once}: change one of the three"
        )
    micro_batches = training.global_batch_size // samples_at_once
    if parallel.pp == 1:
        whole = tuple(range(model.num_hidden_layers))
        return RunLayout(layout=layout, context=context, layers=(whole,), per_rank=1, micro_batches=micro_batches)
    per_rank = stages_per_rank(parallel.schedule, parallel.stages_per_rank)
    try:
        check_schedule(parallel.schedule, parallel.pp, per_rank, micro_batches, model.num_hidden_layers)
    except LayoutError as error:
        raise UserError(f"parallel: {error}") from None
    layers = _stage_layers(config, parallel.pp * per_rank)
    by_stage = tuple(map(tuple, layers))
    return RunLayout(layout=layout, context=context, layers=by_stage, per_rank=per_rank, micro_batches=micro_batches)


@lru_cache(maxsize=1024)
def _split_by_cost(model: ModelConfig, sequence_length: int, stages: int) -> Sequence[Sequence[int]]:
    """Cached: `qwen-moe plan` asks for the same few splits ten thousand times."""
    costs = layer_costs(model, sequence_length)
    return split_layers(costs.layers, stages, first=costs.embedding, last=costs.head)


def _stage_layers(config: RunConfig, stages: int) -> Sequence[Sequence[int]]:
    split, layers = config.parallel.pipeline_split, config.model.num_hidden_layers
    if not split:
        return _split_by_cost(config.model, config.data.sequence_length, stages)
    if len(split) != stages or sum(split) != layers:
        raise UserError(
            f"parallel.pipeline_split {list(split)} has {counted(len(split), 'stage')} with "
            f"{counted(sum(split), 'layer')}, but there are "
            f"{counted(stages, 'stage')} and {counted(layers, 'layer')}: give that many numbers with that sum, or "
            "leave it out"
        )
    by_stage, begin = [], 0
    for count in split:
        by_stage.append(range(begin, begin + count))
        begin += count
    return by_stage
