"""Predicts the step time of every legal layout, then checks from the fastest on whether they fit, until enough do."""

import heapq
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from launchers.counted import counted
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.planning.context import Traffic
from qwen_moe.planning.hardware import Cluster
from qwen_moe.planning.layouts import PRECISIONS, Choice, Kind, kinds, legal_choices, nearest_batches
from qwen_moe.planning.memory import Memory, MemoryModel
from qwen_moe.planning.neighbors import Neighbors, Timed
from qwen_moe.planning.sampling import SamplingModel, SamplingTime
from qwen_moe.planning.software import OURS
from qwen_moe.planning.step_time import StepTimeModel
from qwen_moe.planning.times import StepTime
from qwen_moe.progress import bar
from qwen_moe.sharding.aligned import ALIGNED
from qwen_moe.sharding.layout import ContextPlan, RunLayout

_CLEARLY = 0.98  # of a step's time, from which on a gain that rests on an assumption is worth a line


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A layout with its predictions. Rates are per GPU; ``mfu`` is relative to the peak of the layout's precision.
    ``traffic``: of context parallelism, for each layer and micro-batch. ``sampling``: of an episode, if the run samples."""

    choice: Choice
    layout: RunLayout
    memory: Memory
    step: StepTime
    traffic: Traffic
    tokens_per_second: float
    tflops: float
    mfu: float
    gpu_hours: float
    cost: float
    sampling: SamplingTime | None = None

    def facts(self) -> dict[str, Any]:
        grid = self.layout.layout
        return {
            **vars(self.choice),
            "dp": grid.dp,
            "edp": grid.edp,
            "micro_batches": self.layout.micro_batches,
            "layers_per_stage": [len(layers) for layers in self.layout.layers],
            "memory_bytes": self.memory.facts(),
            "step_seconds": asdict(self.step) | {"total": self.step.total},
            "sampling_seconds": None
            if self.sampling is None
            else asdict(self.sampling) | {"total": self.sampling.total},
            "cp_bytes_per_layer": {"forward": self.traffic.forward, "backward": self.traffic.backward},
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "tflops_per_gpu": self.tflops,
            "mfu": self.mfu,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
        }


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A layout that would be faster than the best one but does not fit, and the nearest layout that does."""

    scored: Scored
    nearest: Scored | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of a search. ``best``: the fastest layouts that fit, no two with the same degrees. ``kinds``: the first of
    them with every kind of context parallelism, fastest first, if it has any. ``overlapped``: the first with
    ``parallel.ep_overlap``, if this is allowed and would be `_CLEARLY` faster. ``gpus_needed``: if nothing fits, a number of
    GPUs on which something does (0: none was found)."""

    config: RunConfig
    gpus: int
    cluster: Cluster
    legal: int
    seconds: float
    best: list[Scored]
    misfits: list[Misfit]
    kinds: list[Scored]
    overlapped: Scored | None = None
    gpus_needed: int = 0


FIELDS = (
    *(
        "recompute",
        "micro_batch",
        "sharding",
        "gradient_reduction",
        "schedule",
        "per_rank",
        "pp",
        "tp",
        "ep",
        "etp",
        "cp",
        "cp_kind",
        "cp_ulysses",
    ),
    "precision",
)


def changes(old: Choice, new: Choice) -> list[str]:
    """The fields that differ, as ``field old -> new``."""
    found = []
    for name in FIELDS:
        before, after = getattr(old, name), getattr(new, name)
        if before != after and not (name in ("schedule", "per_rank") and new.pp == 1):
            found.append(f"{name} {before} -> {after}")
    return found


class Search:
    """The search for layouts of one recipe on ``gpus`` GPUs of one cluster."""

    def __init__(
        self,
        config: RunConfig,
        gpus: int,
        cluster: Cluster,
        imbalance: float = 1.0,
        price: float | None = None,
        precisions: tuple[str, ...] = PRECISIONS,
    ) -> None:
        self.config, self.gpus, self.cluster, self.gpu = config, gpus, cluster, cluster.gpu
        self.price = self.gpu.price_per_gpu_hour if price is None else price
        self.precisions = tuple(name for name in precisions if name in self.gpu.peak_tflops)
        self.memory = MemoryModel(config)
        sequence = config.data.sequence_length
        # Fewer GPUs than a node has divide no group.
        whole = replace(cluster, gpus_per_node=min(gpus, cluster.gpus_per_node))
        self.time = StepTimeModel(config.model, sequence, whole, OURS, imbalance)
        self.sampling = SamplingModel(config, self.time)
        self._picked: dict[tuple[int, int, int], list[Kind]] = {}

    def run(self, top: int) -> Plan:
        """Raises UserError when no layout is legal."""
        begin = time.monotonic()
        found = [
            (self._step(choice, layout), choice, layout)
            for choice, layout in bar(
                legal_choices(self.config, self.gpus, wanted=self.precisions, pick=self._kinds),
                "plan: time of layouts",
                " layout",
            )
            if self._countable(choice)
        ]
        if not found:
            named = " or ".join(self.precisions) or "a precision that this GPU has"
            near = " or ".join(f"{size:,}" for size in nearest_batches(self.config, self.gpus, self.precisions))
            raise UserError(
                f"no layout of {counted(self.config.model.num_hidden_layers, 'layer')} with a global batch of "
                f"{self.config.training.global_batch_size} is legal on {counted(self.gpus, 'GPU')} in {named}: change "
                "--gpus, "
                "--global-batch, --precision or training.micro_batch_size (data-parallel ranks x micro-batch must divide "
                f"the global batch){'. --global-batch ' + near + ' would be legal' if near else ''}"
            )
        best, faster = self._fastest_that_fit(found, top)
        misfits = self._misfits(faster, bool(best), found)
        compared = self._compared(best[0]) if best and best[0].choice.cp > 1 else []
        needed = 0 if best else self._enough_gpus()
        return Plan(
            config=self.config,
            gpus=self.gpus,
            cluster=self.cluster,
            legal=len(found),
            seconds=time.monotonic() - begin,
            best=best,
            misfits=misfits,
            kinds=compared,
            overlapped=self._overlapped(best[0]) if best else None,
            gpus_needed=needed,
        )

    def _fastest_that_fit(self, found: list[Timed], top: int) -> tuple[list[Scored], list[Timed]]:
        """The ``top`` fastest layouts that fit, no two with the same degrees, and the faster ones that do not."""
        best: list[Scored] = []
        faster: list[Timed] = []
        seen: set[tuple[int, ...]] = set()
        heap = [(timed[0].total, number, timed) for number, timed in enumerate(found)]
        heapq.heapify(heap)
        by_time = (heapq.heappop(heap) for _ in iter(lambda: bool(heap), False))
        for _, number, (step, choice, layout) in bar(by_time, "plan: memory of the fastest", " layout"):
            degrees = (choice.tp, choice.pp, choice.cp, choice.ep, choice.etp)
            if degrees in seen:
                continue
            scored = self._fitting(step, choice, layout)
            if scored is not None:
                seen.add(degrees)
                best.append(scored)
                if len(best) == top:
                    break
                continue
            if not best:
                faster.append((step, choice, layout))
            for leaner in (self._as_ring(choice, layout), self._as_every(choice, layout)):
                if leaner is not None:
                    heapq.heappush(heap, (leaner[0].total, number, leaner))
        # What is pushed late may be faster than what was found before.
        return sorted(best, key=lambda scored: scored.step.total), faster

    def _as_every(self, choice: Choice, layout: RunLayout) -> Timed | None:
        """The layout with gradients reduced after every micro-batch, if this makes a difference and is allowed."""
        grid = layout.layout
        alone = layout.micro_batches == 1 or max(grid.dp * grid.cp, grid.edp) == 1
        if alone or choice.gradient_reduction == "every" or self.config.precision.master == "bf16":
            return None
        choice = choice.changed(gradient_reduction="every")
        return self._step(choice, layout), choice, layout

    def _as_ring(self, choice: Choice, layout: RunLayout) -> Timed | None:
        """The layout with another kind of context parallelism, the one that needs the least memory."""
        if choice.cp == 1 or (choice.cp_kind, choice.cp_ulysses) == ("ring", 1):
            return None
        choice = replace(choice, cp_kind="ring", cp_ulysses=1)
        layout = replace(layout, context=ContextPlan(kind="ring"))
        return self._step(choice, layout), choice, layout

    def _step(self, choice: Choice, layout: RunLayout) -> StepTime:
        """The time of a step, with its share of sampling and what comes before it."""
        step, rollout = self.time.step(choice, layout), self.config.rollout
        if rollout is None:
            return step
        sampling = self.sampling.of_episode(choice, layout)
        share = 0.0 if sampling is None else sampling.total / rollout.updates_per_episode
        return replace(step, sampling=share, preparing=self.sampling.preparing(choice, step))

    def _compared(self, scored: Scored) -> list[Scored]:
        """``scored`` with every kind of context parallelism, fastest first."""
        found = []
        for kind in kinds(self.config, scored.layout.layout):
            choice = replace(scored.choice, cp_kind=kind.cp_kind, cp_ulysses=kind.cp_ulysses)
            layout = replace(scored.layout, context=kind.context)
            found.append(self._whole((self._step(choice, layout), choice, layout)))
        return sorted(found, key=lambda one: one.step.total)

    def _overlapped(self, scored: Scored) -> Scored | None:
        """``scored`` with ``ep_overlap``, if its halves can take turns and this would be clearly faster. The search does not
        order layouts by it: how much hides was measured nowhere."""
        choice = scored.choice.changed(ep_overlap=True)
        recipe = self.config.precision.fp8.recipe if choice.precision == "fp8" else ""
        if scored.choice.ep_overlap or not choice.overlaps or recipe == "delayed":
            return None
        step = self._step(choice, scored.layout)
        return self._whole((step, choice, scored.layout)) if step.total < _CLEARLY * scored.step.total else None

    def _kinds(self, choice: Choice, found: list[Kind]) -> list[Kind]:
        """The fastest kind of context parallelism for the degrees and the micro-batch of ``choice``."""
        key = (choice.tp, choice.cp, choice.micro_batch)
        if key not in self._picked:
            self._picked[key] = [min(found, key=lambda kind: self.time.context_seconds(choice, kind.context))]
        return self._picked[key]

    def _countable(self, choice: Choice) -> bool:
        """Whether slices of experts are multiples of the 16 bytes that grouped GEMMs need (`planning.saved`). Other slices
        are legal, but their experts run one at a time, which nobody wants."""
        model = self.config.model
        return choice.etp == 1 or (model.moe_intermediate_size // choice.etp) % ALIGNED == 0

    def _score(self, choice: Choice, layout: RunLayout, memory: Memory, step: StepTime) -> Scored:
        rate = self.config.tokens_per_step / step.total / self.gpus
        tflops = rate * self.time.flops() / 1e12
        hours = self.config.training.train_tokens / rate / 3600
        return Scored(
            choice=choice,
            layout=layout,
            memory=memory,
            step=step,
            traffic=self.time.context.traffic(choice, layout.context),
            tokens_per_second=rate,
            tflops=tflops,
            mfu=tflops / self.gpu.peak_tflops[choice.precision],
            gpu_hours=hours,
            cost=hours * self.price,
            sampling=self.sampling.of_episode(choice, layout),
        )

    def _whole(self, timed: Timed) -> Scored:
        step, choice, layout = timed
        return self._score(choice, layout, self.memory.fullest(choice, layout), step)

    def _fitting(self, step: StepTime, choice: Choice, layout: RunLayout) -> Scored | None:
        """The layout with its memory, or None if it does not fit."""
        if self.memory.floor(choice, layout) > self.gpu.usable_bytes:
            return None
        scored = self._whole((step, choice, layout))
        return scored if scored.memory.total <= self.gpu.usable_bytes else None

    def _telling(self, misfits: list[Timed], something_fits: bool) -> list[Scored]:
        """The fastest layouts with three different sets of degrees, first those that nearly fit; or, if nothing fits, those
        that need the least memory."""
        found: dict[tuple[int, ...], Scored] = {}
        for timed in self._nearly_first(misfits) if something_fits else self._leanest(misfits):
            choice = timed[1]
            degrees = (choice.tp, choice.pp, choice.cp, choice.ep, choice.etp)
            if degrees not in found:
                found[degrees] = self._whole(timed)
            if len(found) == 3:
                break
        return list(found.values())

    def _nearly_first(self, misfits: list[Timed]) -> Iterator[Timed]:
        """``misfits`` in their order, except that those that surely need more than twice the memory come last: to learn that
        they do not fit teaches little, and what would fit in their place is far from them."""
        far = []
        for timed in misfits:
            if self.memory.floor(*timed[1:]) > 2 * self.gpu.usable_bytes:
                far.append(timed)
            else:
                yield timed
        yield from far

    def _leanest(self, misfits: list[Timed]) -> Iterator[Timed]:
        """``misfits`` by the memory that they need, from the least on. Each waits by a lower bound and has its activations
        counted only when no other has less."""
        heap = [
            (self.memory.floor(choice, layout), number, False) for number, (_, choice, layout) in enumerate(misfits)
        ]
        heapq.heapify(heap)
        while heap:
            _, number, counted = heapq.heappop(heap)
            _, choice, layout = misfits[number]
            if counted:
                yield misfits[number]
            else:
                heapq.heappush(heap, (self.memory.fullest(choice, layout).total, number, True))

    def _misfits(self, faster: list[Timed], something_fits: bool, found: list[Timed]) -> list[Misfit]:
        if not faster:
            return []
        neighbors = Neighbors(found)
        return [
            Misfit(scored=scored, nearest=self._nearest(scored.choice, neighbors))
            for scored in self._telling(faster, something_fits)
        ]

    def _nearest(self, choice: Choice, neighbors: Neighbors) -> Scored | None:
        """The fastest layout that fits and differs in one field, else in recomputation and one field."""
        for start in dict.fromkeys((choice, choice.changed(recompute="full"))):
            for step, other, layout in bar(self._around(start, neighbors), "plan: what would fit", " layout"):
                found = self._fitting(step, other, layout)
                if found is not None:
                    return found
        return None

    def _around(self, choice: Choice, neighbors: Neighbors) -> list[Timed]:
        """``choice`` and what differs from it in one field, fastest first. ``neighbors`` all reduce gradients at the end."""
        same = choice.changed(gradient_reduction="last")
        plain = neighbors.of(same)
        own = [timed for timed in plain if timed[1] == same]
        every = [self._as_every(*timed[1:]) for timed in (own if choice == same else plain)]
        near = [*(plain if choice == same else own), *(timed for timed in every if timed is not None)]
        return sorted(near, key=lambda timed: timed[0].total)

    def _enough_gpus(self) -> int:
        """The smallest of 2, 4, ... 32 times the GPUs on which a layout fits, or 0. Only whole nodes can be planned for."""
        node = self.cluster.gpus_per_node
        for gpus in (times * self.gpus for times in (2, 4, 8, 16, 32)):
            if gpus > node and gpus % node:
                continue
            fits = (
                choice.recompute == "full"
                and self.memory.floor(choice, layout) <= self.gpu.usable_bytes
                and self.memory.fullest(choice, layout).total <= self.gpu.usable_bytes
                for least, layout in bar(
                    legal_choices(self.config, gpus, (1,), self.precisions, pick=self._kinds),
                    f"plan: what fits on {counted(gpus, 'GPU')}",
                    " layout",
                )
                if self._countable(least)
                for choice in (least, *(timed[1] for timed in (self._as_every(least, layout),) if timed is not None))
            )
            if any(fits):
                return gpus
        return 0
