"""From a recipe and a number of processes to a layout: the one check that everything fits, before any work starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from qwen_moe.config import ModelConfig, RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.flops import layer_costs

if TYPE_CHECKING:
    from parallel.mesh import Layout


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """Degrees, and which layers each pipeline stage has."""

    layout: "Layout"
    layers: tuple[tuple[int, ...], ...]  # of each stage
    per_rank: int  # stages
    micro_batches: int  # per step and data-parallel rank


def _degrees(config: RunConfig) -> dict[str, int]:
    parallel = config.parallel
    return {name: getattr(parallel, name) for name in ("pp", "cp", "tp", "ep", "etp")}


def processes(config: RunConfig) -> int:
    """Processes to start on this machine: ``launch.nproc``, or the next number that the layout divides."""
    from parallel.mesh import smallest_world

    return smallest_world(config.launch.nproc, **_degrees(config))


def run_layout(config: RunConfig, world_size: int) -> RunLayout:
    """The layout of ``config`` on ``world_size`` processes. Raises UserError naming every factor that does not fit."""
    from parallel.mesh import LayoutError, layout_for
    from parallel.pipeline import check_schedule, stages_per_rank
    from qwen_moe.models.plan import check_layout

    parallel, training, model = config.parallel, config.training, config.model
    try:
        layout = layout_for(world_size, **_degrees(config))
        check_layout(model, layout, config.data.sequence_length)
    except LayoutError as error:
        raise UserError(f"parallel: {error}") from None
    wave = training.micro_batch_size * layout.dp
    if training.global_batch_size % wave:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x {layout.dp} data-parallel processes = {wave}: change one of the three"
        )
    micro_batches = training.global_batch_size // wave
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
    from parallel.pipeline import split_layers

    costs = layer_costs(model, sequence_length)
    return split_layers(costs.layers, stages, first=costs.embedding, last=costs.head)


def _stage_layers(config: RunConfig, stages: int) -> Sequence[Sequence[int]]:
    given, layers = config.parallel.pipeline_split, config.model.num_hidden_layers
    if not given:
        return _split_by_cost(config.model, config.data.sequence_length, stages)
    if len(given) != stages or sum(given) != layers:
        raise UserError(
            f"parallel.pipeline_split {list(given)} has {len(given)} stages with {sum(given)} layers, but there are "
            f"{stages} stages and {layers} layers: give that many numbers with that sum, or leave it out"
        )
    found, begin = [], 0
    for count in given:
        found.append(range(begin, begin + count))
        begin += count
    return found
