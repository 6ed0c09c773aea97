"""Lists every layout that a run may have on a number of GPUs, by the run's own check (`sharding.layout.run_layout`)."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from typing import Any, get_args

from pydantic import ValidationError

from parallel.mesh import Layout, LayoutError, layout_for
from qwen_moe.config import ParallelConfig, PrecisionConfig, RunConfig, TrainingConfig
from qwen_moe.errors import UserError
from qwen_moe.sharding.layout import ContextPlan, RunLayout, check_layout, context_plan, run_layout

PRECISIONS = ("bf16", "fp8")
LEAST_TOKENS = 4096  # of a sequence on a cp rank; with fewer, tp and dp are better


@dataclass(frozen=True)
class Kind:
    """``parallel.cp_kind`` and ``cp_ulysses``, and what follows from them."""

    cp_kind: str
    cp_ulysses: int
    context: ContextPlan


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that the search chooses. ``per_rank`` is the number of pipeline stages on each rank, never 0 here.
    ``cp_kind`` and ``cp_ulysses`` are those of the recipe, and matter only with cp above 1; ``ep_overlap`` too, where
    `overlaps`."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    cp_kind: str = "auto"
    cp_ulysses: int = 1
    ep: int = 1
    etp: int = 1
    ep_overlap: bool = False
    schedule: str = "1f1b"
    per_rank: int = 1
    micro_batch: int = 1
    recompute: str = "none"
    sharding: str = "zero2"
    gradient_reduction: str = "last"
    precision: str = "bf16"

    def __str__(self) -> str:
        degrees = [
            f"{name}={getattr(self, name)}" for name in ("tp", "pp", "cp", "ep", "etp") if getattr(self, name) > 1
        ]
        if self.cp > 1:
            degrees.append(
                f"cp_kind={self.cp_kind}" + (f" cp_ulysses={self.cp_ulysses}" if self.cp_ulysses > 1 else "")
            )
        if self.pp > 1:
            degrees.append(self.schedule + (f"x{self.per_rank}" if self.schedule == "interleaved_1f1b" else ""))
        degrees += ["ep_overlap"] if self.overlaps else []
        degrees += [f"mb={self.micro_batch}", self.sharding]
        degrees += ["gradient_reduction=every"] if self.gradient_reduction == "every" else []
        degrees += ["recompute"] if self.recompute == "full" else []
        return " ".join([*degrees, self.precision])

    @property
    def overlaps(self) -> bool:
        """Whether the halves of a micro-batch take turns: ``ep_overlap``, where tokens travel and there are two halves."""
        return self.ep_overlap and self.ep * self.etp > 1 and self.micro_batch % 2 == 0

    def changed(self, **fields: Any) -> "Choice":
        """As `dataclasses.replace`, in a tenth of its time, which counts: a search makes a choice for every layout."""
        found = object.__new__(Choice)
        found.__dict__.update(self.__dict__, **fields)
        return found

    def settings(self) -> dict[str, dict[str, Any]]:
        """These settings as sections of a recipe."""
        per_rank = self.per_rank if self.pp > 1 and self.schedule == "interleaved_1f1b" else 0
        names = ("tp", "pp", "cp", "cp_kind", "cp_ulysses", "ep", "etp")
        degrees = {name: getattr(self, name) for name in names}
        parallel = degrees | {"schedule": self.schedule, "stages_per_rank": per_rank, "sharding": self.sharding}
        parallel |= {"ep_overlap": self.overlaps} if self.ep_overlap else {}
        parallel["gradient_reduction"] = self.gradient_reduction
        return {
            "parallel": parallel,
            "training": {"micro_batch_size": self.micro_batch, "recompute": self.recompute},
            "precision": {"compute": self.precision},
        }


def apply(config: RunConfig, choice: Choice) -> RunConfig:
    """``config`` with the settings of ``choice``. Raises ValueError if the config's own checks refuse them."""
    settings = choice.settings()
    changed = config.model_copy(
        update={
            "parallel": ParallelConfig(**vars(config.parallel) | settings["parallel"] | {"pipeline_split": ()}),
            "training": _training(config.training, choice.micro_batch, choice.recompute),
            "precision": _precision(config.precision, choice.precision),
        }
    )
    changed.check()  # the other sections are unchanged and have been checked before
    return changed


# Cached, because a search asks for the same few sections ten thousand times.
@lru_cache(maxsize=64)
def _training(base: TrainingConfig, micro_batch: int, recompute: str) -> TrainingConfig:
    return TrainingConfig(**vars(base) | {"micro_batch_size": micro_batch, "recompute": recompute})


@lru_cache(maxsize=64)
def _precision(base: PrecisionConfig, compute: str) -> PrecisionConfig:
    return PrecisionConfig(**vars(base) | {"compute": compute})


def legal(config: RunConfig, choice: Choice, gpus: int) -> RunLayout | str:
    """The layout of ``choice`` on ``gpus`` processes, or the reason why it is not legal."""
    try:
        return run_layout(apply(config, choice), gpus)
    except (UserError, ValueError) as error:
        return str(error)


@cache
def _allowed_shardings(pp: int, schedule: str) -> list[str]:
    """They have the same layout."""
    found = []
    for sharding in get_args(ParallelConfig.model_fields["sharding"].annotation):
        with suppress(ValidationError):
            ParallelConfig(pp=pp, schedule=schedule, sharding=sharding)
            found.append(sharding)
    return found


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def kinds(config: RunConfig, layout: Layout) -> list[Kind]:
    """The kinds of context parallelism that a run would accept with the degrees of ``layout``, ring first."""
    if layout.cp == 1:
        return [_kind(config, layout, "auto", 1)]
    within = [degree for degree in divisors(layout.cp) if 1 < degree < layout.cp]
    named = [("ring", 1), ("all_gather", 1), ("ulysses", 1)]
    named += [(kind, degree) for degree in within for kind in ("ring", "all_gather")]
    found = []
    for kind, ulysses in named:
        with suppress(LayoutError):
            found.append(_kind(config, layout, kind, ulysses))
    return found


def _kind(config: RunConfig, layout: Layout, kind: str, ulysses: int) -> Kind:
    settings = vars(config.parallel) | {"cp_kind": kind, "cp_ulysses": ulysses}
    changed = config.model_copy(update={"parallel": ParallelConfig(**settings)})
    return Kind(kind, ulysses, context_plan(changed, layout))


Pick = Callable[[Choice, list[Kind]], list[Kind]]


def all_kinds(choice: Choice, found: list[Kind]) -> list[Kind]:
    """Every kind of context parallelism that is legal with the degrees of ``choice``."""
    return found


def _degrees(config: RunConfig, gpus: int, least_tokens: int) -> Iterator[tuple[Choice, Layout, list[Kind]]]:
    """The degrees that the number of GPUs and the model allow, by the checks that `run_layout` makes first, and the kinds of
    context parallelism. With cp above 1, a rank has at least ``least_tokens`` of a sequence, or cp is the recipe's."""
    sequence = config.data.sequence_length
    by_split: dict[tuple[int, int], list[Kind]] = {}
    fits: dict[tuple[int, int, int, int], bool] = {}  # whether the model does, which does not depend on pp and dp
    for pp in divisors(gpus):
        if pp > config.model.num_hidden_layers:
            continue
        for tp in divisors(gpus // pp):
            for cp in divisors(gpus // pp // tp):
                if cp not in (1, config.parallel.cp) and sequence < least_tokens * cp:
                    continue
                for ep in divisors(gpus // pp):
                    for etp in divisors(gpus // pp // ep):
                        if not fits.get((tp, cp, ep, etp), True):
                            continue
                        try:
                            layout = layout_for(gpus, pp=pp, tp=tp, cp=cp, ep=ep, etp=etp)
                            if (tp, cp, ep, etp) not in fits:
                                fits[tp, cp, ep, etp] = False
                                check_layout(config.model, layout, sequence)
                                fits[tp, cp, ep, etp] = True
                        except LayoutError:
                            continue
                        if (tp, cp) not in by_split:
                            by_split[tp, cp] = kinds(config, layout)
                        overlap = config.parallel.ep_overlap
                        degrees = Choice(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, ep_overlap=overlap)
                        yield degrees, layout, by_split[tp, cp]


def _schedules(pp: int, layers: int) -> Iterator[tuple[str, int]]:
    """Every (schedule, stages per rank) to try."""
    if pp == 1:
        yield "1f1b", 1
        return
    for schedule in get_args(ParallelConfig.model_fields["schedule"].annotation):
        if schedule == "interleaved_1f1b":
            yield from ((schedule, count) for count in range(2, layers // pp + 1))
        else:
            yield schedule, 1 if schedule == "1f1b" else 2


def precisions(config: RunConfig, wanted: tuple[str, ...]) -> list[str]:
    """The precisions in ``wanted`` that are compatible with the recipe's other precision settings."""
    found = []
    for name in wanted:
        try:
            PrecisionConfig(**config.precision.model_dump() | {"compute": name})
        except ValidationError:
            continue
        found.append(name)
    return found


def legal_choices(
    config: RunConfig,
    gpus: int,
    micro_batches: tuple[int, ...] = (1, 2, 4, 8),
    wanted: tuple[str, ...] = PRECISIONS,
    least_tokens: int = LEAST_TOKENS,
    pick: Pick = all_kinds,
) -> Iterator[tuple[Choice, RunLayout]]:
    """Every legal choice on ``gpus`` processes, with the layout that the run would have. ``pick`` chooses among the kinds of
    context parallelism, which do not change what else is legal; see `_degrees` for ``least_tokens``."""
    sizes = sorted({*micro_batches, config.training.micro_batch_size})
    computes = precisions(config, wanted)
    if not computes:
        return
    numerics = [
        {"precision": precision, "recompute": recompute} for precision, recompute in product(computes, ("none", "full"))
    ]
    batches: dict[tuple[int, int], list[tuple[Choice, RunLayout]]] = {}  # what pp and dp allow
    for degrees, grid, possible in _degrees(config, gpus, least_tokens):
        any_kind = {"cp_kind": possible[0].cp_kind, "cp_ulysses": possible[0].cp_ulysses}
        if (grid.pp, grid.dp) not in batches:
            base = degrees.changed(**any_kind, precision=computes[0])
            batches[grid.pp, grid.dp] = list(_batches(config, base, grid, sizes))
        for example, plan in batches[grid.pp, grid.dp]:
            own = {"schedule": example.schedule, "per_rank": example.per_rank, "micro_batch": example.micro_batch}
            first = degrees.changed(**any_kind, **own, precision=computes[0])
            picked = pick(first, possible) if degrees.cp > 1 else possible
            for kind in picked:
                layout = replace(plan, layout=grid, context=kind.context)
                of_kind = {"cp_kind": kind.cp_kind, "cp_ulysses": kind.cp_ulysses}
                for sharding, settings in product(_allowed_shardings(first.pp, first.schedule), numerics):
                    yield first.changed(**of_kind, sharding=sharding, **settings), layout


def nearest_batches(config: RunConfig, gpus: int, wanted: tuple[str, ...]) -> list[int]:
    """The nearest global batches on both sides of the recipe's with which a layout on ``gpus`` processes is legal."""
    batch = config.training.global_batch_size
    ranks = {grid.dp for _, grid, _ in _degrees(config, gpus, LEAST_TOKENS)}
    below = {batch // dp * dp for dp in ranks} - {0, batch}
    above = {(batch // dp + 1) * dp for dp in ranks}

    def is_legal(size: int) -> bool:
        training = config.training.model_copy(update={"global_batch_size": size})
        changed = config.model_copy(update={"training": training})
        return next(legal_choices(changed, gpus, wanted=wanted), None) is not None

    sides = (sorted(below, reverse=True), sorted(above))
    return [found for side in sides if (found := next(filter(is_legal, side), 0))]


def _batches(config: RunConfig, base: Choice, grid: Layout, sizes: list[int]) -> Iterator[tuple[Choice, RunLayout]]:
    """The legal schedules and micro-batches with the degrees of ``base``, in order. They are the same for all degrees with
    the same pp and dp: what `run_layout` checks besides degrees is the batch and the schedule, and what it finds are
    the layers of each stage and the number of micro-batches. It depends neither on recomputation nor on precision."""
    for schedule, per_rank in _schedules(base.pp, config.model.num_hidden_layers):
        for micro_batch in sizes:
            if config.training.global_batch_size % (micro_batch * grid.dp):
                continue  # as the check would find, after much else
            choice = base.changed(schedule=schedule, per_rank=per_rank, micro_batch=micro_batch)
            found = legal(config, choice, grid.world_size)
            if not isinstance(found, str):
                yield choice, found
