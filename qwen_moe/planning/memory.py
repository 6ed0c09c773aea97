"""Peak memory of a rank during a step, in bytes.

Parameters, gradients and optimizer state follow from shapes and are exact. Besides its shards, FSDP2 holds:

* Gathered weights in the compute dtype, with the dim that is cut (`parallel.data.cut_dim`) padded to a multiple of the
  data-parallel ranks. With zero2 every unit is held from the first forward to the end of the micro-batch's backward, or of
  the step under a pipeline. With zero3 the root and two units are held at a time; under a pipeline all are, because
  torch.distributed.pipelining keeps what a backward has gathered until the last backward.
* Unsharded gradients. If they are reduced once per step, and there are several micro-batches or a pipeline: those of every
  unit, in the dtype of their reduction, from the first micro-batch's backward to the last's. If they are reduced after every
  micro-batch: those of one unit at a time (of one stage, where a schedule splits backward), in the compute dtype.
* The buffers of one all-gather and one reduction of a unit. What is cut along another dim than 0 is gathered into a
  buffer of its own before it is put in order.

Schedules that split backward into two halves (zbv, dualpipev) keep all activations between them and, for the second half,
the gradients of what each weight was used for. These are counted like the activations, and so is what was recomputed. The
first stage's whole backward is in the second half, so it keeps none.

Context parallelism (docs/long-context.md) cuts activations over cp, and dense parameters over dp x cp. What its kinds keep
for backward and what they need for a moment is counted, as everything else is (`saved`).

A pipeline also allocates receive buffers for every micro-batch and stage, in both directions, and keeps them.

With ``ep_overlap`` both halves of a micro-batch together hold what it holds undivided. Autograd adds up a weight's gradients
from both halves before it passes them on. So the gradients of one more unit are alive.

A run that samples its own answers holds their cache beside all its gathered weights, between steps: the larger of both
counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from parallel.stages import V_SHAPED, stages_of_rank
from qwen_moe.config import RunConfig
from qwen_moe.models.flops import DTYPE_BYTES
from qwen_moe.planning.counting import Saved
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.sampling import cache_bytes, samples_itself
from qwen_moe.planning.saved import SavedActivations, Split
from qwen_moe.planning.schedules import Flight, enough, flights
from qwen_moe.planning.shares import FIRST, Place, Shares, UnitShare, add
from qwen_moe.sharding.build import DTYPES
from qwen_moe.sharding.layout import ContextPlan, RunLayout


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a rank in bytes. ``sharded_*``, ``optimizer`` and ``reference`` are exact."""

    sharded_weights: float
    gathered_weights: float
    gradients: float  # the larger of sharded (after the reduction) and unsharded (before)
    sharded_gradients: float
    optimizer: float
    activations: float
    working: float
    buffers: float
    pipeline_rank: int
    reference: float = 0.0  # sharded weights of the frozen model that a divergence is from
    cache: float = 0.0  # while the rank samples
    sampling: float = 0.0  # all that it holds then: weights, optimizer state, reference and cache

    @property
    def weights(self) -> float:
        return self.sharded_weights + self.gathered_weights

    @property
    def total(self) -> float:
        standing = self.weights + self.gradients + self.optimizer + self.reference
        return max(standing + self.activations + self.working + self.buffers, self.sampling)

    def facts(self) -> dict[str, float]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"weights": self.weights, "total": self.total}


class Units(NamedTuple):
    """FSDP units of a rank: the sum of all, elements of the largest root, the largest unit of layers, and elements of the
    largest stage."""

    total: UnitShare
    root: int
    biggest: UnitShare
    stage: int


def _padded(unit: UnitShare) -> int:
    return unit.padded


class MemoryModel:
    """Predicts the memory of one recipe for any choice and layout. Terms that layouts share are computed once."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.model = config, config.model
        self.shares = Shares(config.model)
        self._saved: dict[str, SavedActivations] = {}
        self._recorded: dict[tuple[object, ...], Any] = {}
        self.master = DTYPE_BYTES[config.precision.master]
        objective = config.objective
        self.references = int(objective.reads == "samples" and objective.policy.kl != "none")
        self._stages: dict[tuple[object, ...], Saved] = {}
        self._moe_layers = frozenset(config.model.moe_layers)
        self._units_of: dict[tuple[object, ...], Units] = {}
        self._least_standing: dict[tuple[object, ...], list[float]] = {}
        self._least_layers: dict[tuple[object, ...], tuple[float, float, float]] = {}
        self._in_flight: dict[tuple[object, ...], list[set[tuple[float, float]]]] = {}

    def saved(self, precision: str) -> SavedActivations:
        """The activation counts of layers in ``precision``."""
        if precision not in self._saved:
            self._saved[precision] = SavedActivations(self.config, precision, self._recorded)
        return self._saved[precision]

    def fullest(self, choice: Choice, layout: RunLayout) -> Memory:
        """Memory of the worst-case rank."""
        per_rank = flights(choice.schedule, choice.pp, layout.micro_batches, layout.per_rank)
        return max(
            (self.of_rank(choice, layout, r, f) for r, f in enumerate(per_rank)), key=lambda memory: memory.total
        )

    def floor(self, choice: Choice, layout: RunLayout) -> float:
        """A lower bound of the total of `fullest`: weights, gradients, optimizer state and what layers hold at least. A
        layout for which these do not fit needs no recordings of its own layers, which take most of the time."""
        moe, dense, once = self._least_layer(choice)
        by_rank = zip(self._standing_by_rank(choice, layout), self._layers_in_flight(choice, layout), strict=True)
        return once + max(standing + max(a * moe + b * dense for a, b in moments) for standing, moments in by_rank)

    def _least_layer(self, choice: Choice) -> tuple[float, float, float]:
        """What a rank holds at least: of each MoE layer, of each other one, and in one layer's backward. The ranks
        that share sequences together hold no less than one rank would: no tensor is cut into more pieces than there are
        ranks."""
        ranks, recompute = choice.tp * choice.cp, choice.recompute == "full"
        # Rows that travel are held; those of experts on the same device are not.
        split = Split(ep=2 if choice.ep * choice.etp > 1 else 1)
        key = (choice.precision, choice.micro_batch, recompute, ranks, split)
        if key not in self._least_layers:
            saved = self.saved(choice.precision)
            kinds = {self.model.is_moe_layer(layer) for layer in range(self.model.num_hidden_layers)}
            layers = {kind: saved.layer(split, kind, choice.micro_batch) for kind in kinds}
            whole = {kind: layer.held / ranks for kind, layer in layers.items()}
            held, once = whole, min(layer.working for layer in layers.values()) / ranks
            if recompute:
                held = {kind: saved.layer(split, kind, choice.micro_batch, True).held / ranks for kind in kinds}
                once += min(whole.values())
            self._least_layers[key] = held.get(True, 0.0), held.get(False, 0.0), once
        return self._least_layers[key]

    def _standing_by_rank(self, choice: Choice, layout: RunLayout) -> list[float]:
        """Bytes of weights, gradients and optimizer state of each pipeline rank."""
        # All that they depend on. Hundreds of layouts differ in the micro-batch, recomputation or schedule only.
        several, v_shaped = layout.micro_batches > 1, choice.schedule in V_SHAPED
        held = (choice.sharding, choice.gradient_reduction, choice.precision)
        key = (layout.layout, layout.layers, v_shaped, *held, several)
        if key not in self._least_standing:
            by_rank = (
                stages_of_rank(choice.schedule, choice.pp, layout.per_rank, rank) if choice.pp > 1 else [0]
                for rank in range(choice.pp)
            )
            self._least_standing[key] = [
                sum(self._standing(choice, layout, self._units(layout, stages, FIRST))[:3]) for stages in by_rank
            ]
        return self._least_standing[key]

    def _layers_in_flight(self, choice: Choice, layout: RunLayout) -> list[set[tuple[float, float]]]:
        """For each pipeline rank, at the moments that may be fullest: MoE layers and others, each counted once for every
        micro-batch in flight."""
        key = (choice.schedule, choice.pp, layout.layers, enough(choice.schedule, choice.pp, layout.micro_batches))
        if key not in self._in_flight:
            moe = [len(self._moe_layers.intersection(layers)) for layers in layout.layers]
            dense = [len(layers) - count for layers, count in zip(layout.layers, moe, strict=True)]
            self._in_flight[key] = [
                {(_weighed(moment, flight, moe), _weighed(moment, flight, dense)) for moment in flight.moments}
                for flight in flights(choice.schedule, choice.pp, layout.micro_batches, layout.per_rank)
            ]
        return self._in_flight[key]

    def _units(self, layout: RunLayout, stages: Sequence[int], place: Place) -> Units:
        """The units of a rank's stages."""
        by_stage = [self._stage_units(layout, stage, place) for stage in stages]
        return Units(
            add(one.total for one in by_stage),
            max(one.root for one in by_stage),
            max((one.biggest for one in by_stage), key=_padded),
            max(one.stage for one in by_stage),
        )

    def _standing(self, choice: Choice, layout: RunLayout, units: Units) -> tuple[float, float, float, float]:
        """(gathered weights, largest size of gradients, sharded weights of all models and optimizer state, sharded weights
        alone)."""
        total, root, biggest, stage = units
        compute = DTYPES[choice.precision].itemsize
        sharded = total.sharded * self.master
        if choice.sharding == "zero2" or choice.pp > 1:
            gathered = total.padded
        else:
            gathered = min(total.padded, root + 2 * biggest.padded)
        several = layout.micro_batches > 1
        if choice.gradient_reduction == "last" and (several or choice.pp > 1):
            gradients = max(sharded, total.whole * max(4, compute))
        elif choice.pp > 1 and choice.schedule in V_SHAPED:
            gradients = sharded + stage * compute
        else:
            gradients = sharded + biggest.padded * compute
        held = gathered * compute + self._kept_weights(choice, total)
        return held, gradients, (3 + self.references) * sharded + 4 * total.tensors, sharded

    def of_rank(
        self, choice: Choice, layout: RunLayout, pipeline_rank: int, flight: Flight, place: Place = FIRST
    ) -> Memory:
        """Memory of pipeline rank ``pipeline_rank``, whose stages and micro-batches in flight are ``flight``."""
        compute = DTYPES[choice.precision].itemsize
        reduce = max(4, compute)
        units = self._units(layout, flight.stages, place)
        _, root, biggest, _ = units
        gathered, gradients, states, sharded = self._standing(choice, layout, units)
        cache = self._cache(choice, layout, flight)
        held, working = self._activations(choice, layout, flight)
        if choice.overlaps:  # the gradients of a unit's weights from one half wait for those from the other
            working += biggest.padded * compute
        return Memory(
            sharded_weights=sharded,
            gathered_weights=gathered,
            gradients=gradients,
            sharded_gradients=sharded,
            optimizer=2 * sharded + 4 * units[0].tensors,
            activations=held,
            working=working,
            buffers=max(
                self._unit_buffers(layout, biggest.padded, compute + reduce)
                + self._unit_buffers(layout, biggest.copied, compute),
                # The root is reduced last, when there are no activations left.
                self._unit_buffers(layout, root, reduce) - held - working,
            )
            + self._receive_buffers(choice, layout, flight),
            pipeline_rank=pipeline_rank,
            reference=self.references * sharded,
            cache=cache,
            sampling=states + units[0].padded * compute + cache if cache else 0.0,
        )

    def _cache(self, choice: Choice, layout: RunLayout, flight: Flight) -> float:
        """The cache while the rank samples the answers that it learns from: it then holds no gradients and no activations,
        and all its weights are gathered."""
        if not samples_itself(self.config):
            return 0.0
        layers = sum(len(layout.layers[stage]) for stage in flight.stages)
        return cache_bytes(self.config, choice, layout.layout.dp, layers)

    def _stage_units(self, layout: RunLayout, stage: int, place: Place) -> Units:
        """As `_units`, for one stage: its root and its layers are FSDP units."""
        first, last, layers = stage == 0, stage == len(layout.layers) - 1, layout.layers[stage]
        moe = len(self._moe_layers.intersection(layers))
        key = (layout.layout, place, first, last, moe, len(layers))
        if key not in self._units_of:
            root = self.shares.root(layout.layout, first, last, place)
            units: list[UnitShare] = []
            for kind, times in ((True, moe), (False, len(layers) - moe)):
                if times:
                    units += self.shares.layer(layout.layout, kind, place) * times
            total = add([root, *units])
            self._units_of[key] = Units(total, root.padded, max(units, key=_padded), total.whole)
        return self._units_of[key]

    def _activations(self, choice: Choice, layout: RunLayout, flight: Flight) -> tuple[float, float]:
        """(held, working) bytes when they are largest."""
        stages = [self._stage_activations(choice, layout, stage) for stage in flight.stages]
        at = [[n * one.held for n, one in zip(moment, stages, strict=True)] for moment in flight.moments]
        for sizes, halved in zip(at, flight.halved, strict=bool(flight.halved)):
            sizes += [n * one.between for n, one in zip(halved, stages, strict=True)]
        return max(map(sum, at)), max(one.working for one in stages)

    def _stage_activations(self, choice: Choice, layout: RunLayout, stage: int) -> Saved:
        """Bytes of one stage, held for each micro-batch in flight."""
        layers, last = layout.layers[stage], stage == len(layout.layers) - 1
        moe = len(self._moe_layers.intersection(layers))
        kinds = {kind: times for kind, times in ((True, moe), (False, len(layers) - moe)) if times}
        split = split_of(choice, layout)
        key = (split, choice.precision, choice.micro_batch, choice.recompute, *kinds.items(), stage == 0, last)
        if key not in self._stages:
            self._stages[key] = self._count_stage(choice, split, kinds, stage == 0, last)
        return self._stages[key]

    def _count_stage(self, choice: Choice, split: Split, kinds: dict[bool, int], first: bool, last: bool) -> Saved:
        saved, batch = self.saved(choice.precision), choice.micro_batch
        layers = {moe: saved.layer(split, moe, batch) for moe in kinds}
        held, working = saved.shared(split, batch), max(layer.working for layer in layers.values())
        between = 0.0 if first else sum(kinds[moe] * layer.between for moe, layer in layers.items())
        if not (first or last):  # by then the output is freed, and its gradient is in a receive buffer
            between -= 2 * batch * saved.hidden(split)
        if choice.recompute == "full":
            # Layers keep their outputs and the order of their rows. Backward recomputes one layer at a time. Between its
            # halves, what was recomputed stays.
            working += max(layer.held for layer in layers.values())
            again = {moe: saved.layer(split, moe, batch, recompute=True) for moe in kinds}
            between += 0.0 if first else sum(kinds[moe] * (layers[moe].held - again[moe].held) for moe in kinds)
            layers = again
        held += sum(kinds[moe] * layer.held for moe, layer in layers.items())
        held += saved.first(split, batch) if first else 0.0
        if last:
            head = saved.last(split, batch)
            held, working, between = held + head.held, max(working, head.working), between + head.between
        return Saved(held=held, working=working, between=between)

    @staticmethod
    def _kept_weights(choice: Choice, total: UnitShare) -> float:
        """FP8 copies of weights, which zero2 keeps for a whole step: counted as a byte for every parameter."""
        return float(total.whole) if choice.precision == "fp8" and choice.sharding == "zero2" else 0.0

    @staticmethod
    def _unit_buffers(layout: RunLayout, elements: int, bytes_per_element: int) -> float:
        """The buffers of an all-gather, a reduction or both of one unit."""
        grid = layout.layout
        return float(elements * bytes_per_element) if max(grid.dp * grid.cp, grid.edp) > 1 else 0.0

    def _receive_buffers(self, choice: Choice, layout: RunLayout, flight: Flight) -> float:
        if choice.pp == 1:
            return 0.0
        last = len(layout.layers) - 1
        neighbours: Sequence[int] = [(stage > 0) + (stage < last) for stage in flight.stages]
        hidden = self.saved(choice.precision).hidden(split_of(choice, layout))
        return sum(neighbours) * layout.micro_batches * choice.micro_batch * hidden


def _weighed(moment: Sequence[float], flight: Flight, layers: Sequence[int]) -> float:
    """The sum of ``layers``, by stage, over the micro-batches in flight at ``moment``."""
    return sum(n * layers[stage] for n, stage in zip(moment, flight.stages, strict=True))


def split_of(choice: Choice, layout: RunLayout) -> Split:
    """How the ranks of a layout share a layer."""
    context = layout.context if choice.cp > 1 else ContextPlan()
    return Split(tp=choice.tp, cp=choice.cp, context=context, ep=choice.ep, etp=choice.etp)
