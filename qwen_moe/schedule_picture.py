"""`qwen-moe info --schedule` draws a pipeline schedule, with its idle share and peak activations per rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted
from launchers.folder.atomic import replaced
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError

if TYPE_CHECKING:
    from parallel.timeline import Timeline

COLOURS = {"F": "#4c78a8", "B": "#e4894a", "I": "#e4894a", "W": "#6aa56a"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A simulated schedule."""

    name: str
    pp: int
    micro_batches: int
    per_rank: int
    layers: list[int] | None  # number of layers by stage
    timeline: "Timeline"

    def facts(self) -> dict[str, Any]:
        return {
            "schedule": self.name,
            "pp": self.pp,
            "micro_batches": self.micro_batches,
            "stages_per_rank": self.per_rank,
            "layers": self.layers,
            "idle_share": self.timeline.idle_share,
            "idle_share_per_rank": self.timeline.idle,
            "peak_activations_per_rank": self.timeline.peak,
        }


def describe_schedule(
    recipe: RunConfig | None, *, schedule: str, pp: int | None, micro_batches: int | None, per_rank: int
) -> Schedule:
    """Simulate ``schedule``, with a recipe by the costs of its layers. Arguments that are not given come from the recipe."""
    from parallel.mesh import LayoutError
    from parallel.pipeline import SCHEDULES
    from parallel.stages import check_schedule, split_layers, stages_per_rank
    from parallel.timeline import play
    from qwen_moe.models.flops import layer_costs
    from qwen_moe.sharding.layout import processes, run_layout

    if schedule not in SCHEDULES:
        raise UserError(f"--schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if recipe is not None and pp is None:
        pp = recipe.parallel.pp
    if pp is None or pp < 2:
        raise UserError(f"a pipeline needs at least 2 ranks, not {pp}: give --pp N (or parallel.pp in the recipe)")
    if recipe is not None and micro_batches is None:
        micro_batches = run_layout(recipe, processes(recipe)).micro_batches
    if micro_batches is None or micro_batches < 1:
        raise UserError("give --micro-batches M, 1 or more")
    if recipe is not None and not per_rank and schedule == recipe.parallel.schedule:
        per_rank = recipe.parallel.stages_per_rank
    per_rank = stages_per_rank(schedule, per_rank)
    stages = pp * per_rank
    layers = recipe.model.num_hidden_layers if recipe is not None else stages
    try:
        check_schedule(schedule, pp, per_rank, micro_batches, layers)
    except LayoutError as error:
        raise UserError(str(error)) from None
    if recipe is None:
        timeline = play(schedule, pp, micro_batches, per_rank)
        return Schedule(
            name=schedule, pp=pp, micro_batches=micro_batches, per_rank=per_rank, layers=None, timeline=timeline
        )
    costs = layer_costs(recipe.model, recipe.data.sequence_length)
    own_split = recipe.parallel.pipeline_split
    if own_split and len(own_split) == stages:
        ends = [sum(own_split[: n + 1]) for n in range(stages)]
        split = [list(range(end - count, end)) for end, count in zip(ends, own_split, strict=True)]
    else:
        split = split_layers(costs.layers, stages, first=costs.embedding, last=costs.head)
    by_stage = [sum(costs.layers[layer] for layer in part) for part in split]
    by_stage[0] += costs.embedding
    by_stage[-1] += costs.head
    return Schedule(
        name=schedule,
        pp=pp,
        micro_batches=micro_batches,
        per_rank=per_rank,
        layers=[len(part) for part in split],
        timeline=play(schedule, pp, micro_batches, per_rank, by_stage),
    )


def schedule_text(schedule: Schedule) -> str:
    """The content of the picture as text."""
    line = (
        f"{schedule.name}, pp {schedule.pp}, {counted(schedule.micro_batches, 'micro-batch')}, "
        f"{counted(schedule.per_rank, 'stage')} per rank"
    )
    lines = [line]
    if schedule.layers is not None:
        lines.append(f"  layers by stage   {' '.join(map(str, schedule.layers))}")
    lines.append(f"  idle share        {schedule.timeline.idle_share:.1%} of all ranks' time (the bubble)")
    for rank, (idle, peak) in enumerate(zip(schedule.timeline.idle, schedule.timeline.peak, strict=True)):
        lines.append(
            f"    rank {rank:<4d} idle {idle:6.1%}, activations of {peak:.2f} micro-batches through a rank's layers at most"
        )
    return "\n".join(lines)


def draw_schedule(schedule: Schedule, path: Path) -> None:
    """Draw a PNG: a row per rank and a box per action with its micro-batch, paler for later stages of a rank."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    timeline = schedule.timeline
    figure, axes = plt.subplots(figsize=(min(30, max(9, 0.32 * timeline.length * 1.2)), 1.6 + 0.5 * schedule.pp))
    numbers = timeline.length < 90
    earliest = {rank: min(item.stage for item in timeline.work if item.rank == rank) for rank in range(schedule.pp)}
    for item in timeline.work:
        later = item.stage != earliest[item.rank]
        axes.barh(
            item.rank,
            item.end - item.begin,
            left=item.begin,
            height=0.86,
            color=COLOURS[item.kind],
            alpha=0.62 if later else 1.0,
            edgecolor="white",
            linewidth=0.6,
        )
        if numbers:
            middle = (item.begin + item.end) / 2
            axes.text(middle, item.rank, str(item.micro_batch), ha="center", va="center", fontsize=7, color="white")
    labels = [
        f"rank {rank}\nidle {idle:.0%}, peak {peak:.1f}"
        for rank, (idle, peak) in enumerate(zip(timeline.idle, timeline.peak, strict=True))
    ]
    axes.set_yticks(range(schedule.pp), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.length)
    axes.set_xlabel("time, in forwards of one micro-batch through a rank's layers")
    axes.set_title(
        f"{schedule.name}: pp {schedule.pp}, {counted(schedule.micro_batches, 'micro-batch')}, idle "
        f"{timeline.idle_share:.1%}; "
        "peak = activations held, in micro-batches",
        fontsize=10,
    )
    kinds = [kind for kind in COLOURS if any(item.kind == kind for item in timeline.work)]
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in kinds]
    if schedule.per_rank > 1:
        handles.append(Patch(color="#999999", alpha=0.62, label="paler: a later stage of the rank"))
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.55 / schedule.pp - 0.12), ncol=4, fontsize=8
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
