"""The layout of a recipe on a number of processes. All checks that sizes and degrees fit happen here, before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from parallel.mesh import Layout, LayoutError, layout_for, smallest_world
from parallel.stages import check_schedule, split_layers, stages_per_rank
from qwen_moe.config import ModelConfig, RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.flops import layer_costs


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """The degrees of a run, and the layers of each pipeline stage."""

    layout: Layout
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
        f"parallel: this layout needs {smallest_world(1, **degrees)} processes, each with its own GPU, and this machine has "
        f"{gpus}: lower the degrees of the parallel section, launch it on more nodes, or set CUDA_VISIBLE_DEVICES= to train "
        "on the CPU"
    )


def check_layout(config: ModelConfig, layout: Layout, sequence_length: int) -> None:
    """Raise LayoutError, naming every size that does not divide, unless ``layout`` can split the model."""
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


def run_layout(config: RunConfig, world_size: int) -> RunLayout:
    """The layout of ``config`` on ``world_size`` processes. Raises UserError naming every factor that does not fit."""
    parallel, training, model = config.parallel, config.training, config.model
    try:
        layout = layout_for(world_size, **_degrees(config))
        check_layout(model, layout, config.data.sequence_length)
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
        return RunLayout(layout=layout, layers=(whole,), per_rank=1, micro_batches=micro_batches)
    per_rank = stages_per_rank(parallel.schedule, parallel.stages_per_rank)
    try:
        check_schedule(parallel.schedule, parallel.pp, per_rank, micro_batches, model.num_hidden_layers)
    except LayoutError as error:
        raise UserError(f"parallel: {error}") from None
    layers = _stage_layers(config, parallel.pp * per_rank)
    return RunLayout(layout=layout, layers=tuple(map(tuple, layers)), per_rank=per_rank, micro_batches=micro_batches)


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
            f"parallel.pipeline_split {list(split)} has {len(split)} stages with {sum(split)} layers, but there are "
            f"{stages} stages and {layers} layers: give that many numbers with that sum, or leave it out"
        )
    by_stage, begin = [], 0
    for count in split:
        by_stage.append(range(begin, begin + count))
        begin += count
    return by_stage
