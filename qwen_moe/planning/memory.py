"""Bytes that a rank holds at the fullest moment of a step.

Parameters, gradients and optimizer state follow from shapes and are exact. What FSDP2 holds besides its shards:

* the weights of each unit gathered in the compute dtype: with zero2 from the first forward to the end of the step (under a
  pipeline) or of the micro-batch's backward; with zero3 the root and two units at a time, but under a pipeline all of them,
  because torch.distributed.pipelining keeps what a backward has gathered until the last one;
* the unsharded gradients of every unit, in the dtype of their reduction, from the first micro-batch's backward to the
  last's, when there is more than one (they are reduced once per step);
* the buffers of one all-gather and one reduction of a unit.

Schedules that run backward in two halves (zbv, dualpipev) keep gradients between the two; they are taken as half of the
micro-batch's activations. A pipeline also has a receive buffer for every micro-batch and stage, in both directions, for as long as it lives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from qwen_moe.config import RunConfig
from qwen_moe.models.flops import DTYPE_BYTES
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.saved import SavedActivations
from qwen_moe.planning.schedules import Flight, flights
from qwen_moe.planning.shares import FIRST, Place, Shares, UnitShare, add
from qwen_moe.training.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes. ``sharded_*`` and ``optimizer`` are exact; ``pipeline_rank`` is the one that holds the most."""

    sharded_weights: float
    gathered_weights: float
    gradients: float  # the larger of sharded (after the reduction) and unsharded (before)
    sharded_gradients: float
    optimizer: float
    activations: float
    working: float
    buffers: float
    pipeline_rank: int

    @property
    def weights(self) -> float:
        return self.sharded_weights + self.gathered_weights

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.buffers

    def facts(self) -> dict[str, float]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"weights": self.weights, "total": self.total}


class MemoryModel:
    """Memory of one recipe by choice and layout; terms that layouts share are computed once."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.model = config, config.model
        self.shares, self.saved = Shares(config.model), SavedActivations(config)
        self.master = DTYPE_BYTES[config.precision.master]
        self._layers: dict[tuple[object, ...], tuple[float, float]] = {}

    def units(self, layout: RunLayout, stage: int, place: Place = FIRST) -> list[UnitShare]:
        """FSDP units of one stage: its root, then those of its layers."""
        last = stage == len(layout.layers) - 1
        found = [self.shares.root(layout.layout, stage == 0, last, place)]
        for layer in layout.layers[stage]:
            found += self.shares.layer(layout.layout, self.model.is_moe_layer(layer), place)
        return found

    def fullest(self, choice: Choice, layout: RunLayout) -> Memory:
        """Of the pipeline rank that holds the most, at the place that holds the most."""
        per_rank = flights(choice.schedule, choice.pp, layout.micro_batches, layout.per_rank)
        return max((self.of_rank(choice, layout, r, f) for r, f in enumerate(per_rank)), key=lambda memory: memory.total)

    def of_rank(
        self, choice: Choice, layout: RunLayout, pipeline_rank: int, flight: Flight, place: Place = FIRST
    ) -> Memory:
        """Of pipeline rank ``pipeline_rank``, whose stages and micro-batches in flight are ``flight``."""
        compute = DTYPE_BYTES.get(choice.precision, 2)
        reduce = max(4, compute)
        by_stage = [self._stage_units(layout, stage, place) for stage in flight.stages]
        total = add(unit for stage in by_stage for unit in stage)
        root = max(stage[0].whole for stage in by_stage)
        biggest = max(unit.whole for stage in by_stage for unit in stage[1:])
        held, working = self._activations(choice, layout, flight)
        accumulates = layout.micro_batches > 1
        sharded = total.sharded * self.master
        if choice.sharding == "zero2" or choice.pp > 1:
            gathered = total.whole
        else:
            gathered = min(total.whole, root + 2 * biggest)
        return Memory(
            sharded_weights=sharded,
            gathered_weights=gathered * compute,
            gradients=max(sharded, total.whole * reduce) if accumulates else sharded + biggest * compute,
            sharded_gradients=sharded,
            optimizer=2 * sharded + 4 * total.tensors,
            activations=held,
            working=working,
            buffers=max(
                self._unit_buffers(layout, biggest, compute + reduce),
                # The root is reduced last, when there are no activations left.
                self._unit_buffers(layout, root, reduce) - held - working,
            )
            + self._receive_buffers(choice, layout, flight),
            pipeline_rank=pipeline_rank,
        )

    def _stage_units(self, layout: RunLayout, stage: int, place: Place) -> list[UnitShare]:
        """As `units`, with equal layers added up first: the root, then the largest unit apart from the rest."""
        last = stage == len(layout.layers) - 1
        found = [self.shares.root(layout.layout, stage == 0, last, place)]
        layers = layout.layers[stage]
        moe = sum(self.model.is_moe_layer(layer) for layer in layers)
        for kind, times in ((True, moe), (False, len(layers) - moe)):
            if times:
                units = self.shares.layer(layout.layout, kind, place)
                found += units
                found += [
                    UnitShare(whole=0, sharded=(times - 1) * u.sharded, tensors=(times - 1) * u.tensors) for u in units
                ]
                found += [UnitShare(whole=u.whole, sharded=0, tensors=0) for u in units for _ in range(times - 1)]
        return found

    def _activations(self, choice: Choice, layout: RunLayout, flight: Flight) -> tuple[float, float]:
        """(held, working) bytes at the fullest moment."""
        stages = [self._stage_activations(choice, layout, stage) for stage in flight.stages]
        held = max(sum(n * bytes_ for n, (bytes_, _) in zip(moment, stages, strict=True)) for moment in flight.moments)
        return held, max(working for _, working in stages)

    def _stage_activations(self, choice: Choice, layout: RunLayout, stage: int) -> tuple[float, float]:
        """(held by each micro-batch in flight, working) of one stage."""
        layers, last = layout.layers[stage], stage == len(layout.layers) - 1
        moe = sum(self.model.is_moe_layer(layer) for layer in layers)
        key = (choice.tp, choice.ep, choice.etp, choice.micro_batch, choice.recompute, len(layers), moe, stage == 0, last)
        if key not in self._layers:
            self._layers[key] = self._count_stage(choice, {True: moe, False: len(layers) - moe}, stage == 0, last)
        return self._layers[key]

    def _count_stage(self, choice: Choice, kinds: dict[bool, int], first: bool, last: bool) -> tuple[float, float]:
        saved, tp = self.saved, choice.tp
        hidden = saved.hidden(tp)
        layers = {moe: saved.layer(tp, choice.ep, choice.etp, moe) for moe, times in kinds.items() if times}
        held, working = saved.shared(tp), max(layer.working for layer in layers.values())
        if choice.recompute == "full":
            # What stays is each layer's output. In backward one layer at a time is whole again.
            held += hidden * sum(kinds.values())
            working += max(layer.held for layer in layers.values())
        else:
            held += sum(kinds[moe] * layer.held for moe, layer in layers.items())
        held += saved.first(tp) if first else 0.0
        if last:
            held += saved.last(tp).held
            working = max(working, saved.last(tp).working)
        return choice.micro_batch * held, choice.micro_batch * working

    @staticmethod
    def _unit_buffers(layout: RunLayout, elements: int, bytes_per_element: int) -> float:
        """An all-gather or a reduction, or both, of one unit in flight."""
        return float(elements * bytes_per_element) if max(layout.layout.dp, layout.layout.edp) > 1 else 0.0

    def _receive_buffers(self, choice: Choice, layout: RunLayout, flight: Flight) -> float:
        if choice.pp == 1:
            return 0.0
        last = len(layout.layers) - 1
        neighbours: Sequence[int] = [(stage > 0) + (stage < last) for stage in flight.stages]
        return sum(neighbours) * layout.micro_batches * choice.micro_batch * self.saved.hidden(choice.tp)
