"""A counted step as tables: text for a terminal, Markdown for a page, values for JSON."""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launchers.counted import counted
from qwen_moe.tracing.cost import Work
from qwen_moe.tracing.count import Collective, Event, Place
from qwen_moe.tracing.rank import StepTrace

WIDE = "index kernel over tokens x experts"
_NO_WAIT = (WIDE, "copy from the host without a wait")


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Group:
    """Layers that launch the same, or what is outside layers (``layers`` is empty). Counts are those of one layer."""

    layers: list[int]
    work: dict[tuple[str, str, str], Work]  # by part, phase and operation

    @property
    def name(self) -> str:
        if not self.layers:
            return "outside layers"
        return f"{'layer' if len(self.layers) == 1 else 'each of the layers'} {_ranges(self.layers)}"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def groups(trace: StepTrace) -> list[Group]:
    """Layers with equal counts together, in order; last, what is outside layers."""
    by_layer: dict[int, dict[tuple[str, str, str], Work]] = {}
    for (place, op), work in trace.counter.work.items():
        by_layer.setdefault(place.layer, {})[place.part, place.phase, op] = work
    found: list[Group] = []
    for layer in sorted(by_layer):
        alike = next((g for g in found if layer >= 0 and g.work == by_layer[layer]), None)
        if alike is not None:
            alike.layers.append(layer)
        else:
            found.append(Group([layer] if layer >= 0 else [], by_layer[layer]))
    return sorted(found, key=lambda group: (not group.layers, group.layers))


def total(works: Iterable[Work]) -> Work:
    out = Work()
    for work in works:
        for name, value in asdict(work).items():
            setattr(out, name, getattr(out, name) + value)
    return out


def waits(trace: StepTrace) -> list[Event]:
    """Events at which the host waits for the device."""
    return [event for event in trace.counter.events if event.kind not in _NO_WAIT]


def waits_in_experts(trace: StepTrace) -> float:
    """Per MoE layer of this rank and micro-batch."""
    layers = sum(trace.config.model.is_moe_layer(layer) for layer in trace.layers)
    found = sum(event.place.part == "experts" for event in waits(trace))
    return found / max(1, layers * trace.layout.micro_batches)


def wide_kernels(trace: StepTrace) -> int:
    return sum(event.kind == WIDE for event in trace.counter.events)


def assumptions(trace: StepTrace) -> list[str]:
    """What the counts take for granted."""
    config = trace.config
    found = [
        "The step ran on fake tensors, which have shapes and no values: nothing was computed, and no time was measured.",
        "Routing is even. Gradients are clipped. Every sequence is one document without padding.",
        "Launches are operations of torch. Some are more than one kernel (sort, embedding_bag, a fused optimizer).",
        "Bytes count each operand and each result of an operation once. FLOPs are those of matmuls and attention; causal "
        "attention counts half of its scores, and 5 matmuls in backward.",
        "Attention is called _scaled_dot_product_flash_attention_for_cpu; a GPU runs its own flash kernel in its place.",
        "Chained launches lie in elementwise chains, which become one kernel each where precision.compile is on.",
        "FSDP2's collectives run on streams of their own: what hides them cannot be seen on the host.",
    ]
    if config.precision.compute == "bf16":
        found.append("Experts are torch's grouped GEMM, _grouped_mm, as on a GPU.")
    else:
        found.append(
            f"In {config.precision.compute}, the experts' grouped GEMM is counted as one GEMM of all rows and one weight."
        )
    if config.precision.compute == "fp8":
        found.append("FP8 matmuls are counted as this machine replaces them; a GPU reads operands of one byte.")
    if config.parallel.cp > 1:
        found.append(
            "Attention over parts of a sequence is counted as a CPU computes it, in more launches than a GPU's."
        )
    if config.balance.capacity_factor > 0:
        found.append("One choice in each layer is dropped.")
    return found


def _amount(value: float, unit: str = "") -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {letter}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _cells(work: Work) -> tuple[str, ...]:
    chained = f"{work.chained:,} in {work.chains:,}" if work.chained else "-"
    return f"{work.launches:,}", chained, _amount(work.flops), _amount(work.read, "B"), _amount(work.written, "B")


_COLUMNS = ("launches", "chained", "FLOPs", "read", "written")


def _parts_table(group: Group) -> Table:
    parts = sorted({key[:2] for key in group.work})
    rows = [(*key, *_cells(total(w for k, w in group.work.items() if k[:2] == key))) for key in parts]
    rows.append(("all", "", *_cells(total(group.work.values()))))
    return Table(group.name, ("part", "phase", *_COLUMNS), rows)


def _operations_table(group: Group) -> Table:
    by_part: dict[tuple[str, str], list[Work]] = {}
    for (part, _, op), work in group.work.items():
        by_part.setdefault((part, op), []).append(work)
    rows = [(part, op, *_cells(total(works))) for (part, op), works in sorted(by_part.items())]
    return Table(f"{group.name}: operations by name", ("part", "operation", *_COLUMNS), rows)


def _placed(place: Place, layers: list[int]) -> str:
    where = f"{place.part} of {_ranges(sorted(set(layers)))}" if place.layer >= 0 else place.part
    return f"{where}, {place.phase}" if place.phase else where


def _merged(found: Iterable[Any], key: Callable[[Any], tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], list[Any]]]:
    """Of all layers together: (key, those that have it), in order."""
    out: dict[tuple[Any, ...], list[Any]] = {}
    for one in found:
        out.setdefault((one.place.part, one.place.phase, *key(one)), []).append(one)
    return list(out.items())


def _collectives_table(trace: StepTrace) -> Table:
    rows = []
    for _, alike in _merged(
        trace.counter.collectives, lambda c: (c.place.layer < 0, c.kind, c.axis, c.bytes, c.own_stream, c.behind_flops)
    ):
        call: Collective = alike[0]
        place = _placed(call.place, [c.place.layer for c in alike])
        behind = f"{_amount(call.behind_flops, 'FLOP')}, {counted(call.behind_launches, 'launch')}"
        hidden = "own stream" if call.own_stream else behind if call.behind_launches else "nothing: waited for at once"
        rows.append((place, call.kind, f"{call.axis} ({call.ranks})", f"{call.bytes:,}", f"{len(alike):,}", hidden))
    return Table("collectives", ("place", "kind", "axis (ranks)", "bytes each", "count", "runs beside"), rows)


def _waits_table(trace: StepTrace) -> Table:
    rows = [
        (_placed(alike[0].place, [e.place.layer for e in alike]), e.kind, e.op, e.where, f"{len(alike):,}")
        for _, alike in _merged(trace.counter.events, lambda e: (e.place.layer < 0, e.kind, e.op, e.where))
        for e in alike[:1]
    ]
    return Table(
        "waits of the host, copies and wide index kernels", ("place", "what", "operation", "line", "count"), rows
    )


def tables(trace: StepTrace, operations: bool) -> list[Table]:
    """All tables of a page. ``operations``: also every operation by name."""
    found = groups(trace)
    out = [_parts_table(group) for group in found]
    if operations:
        out += [_operations_table(group) for group in found]
    return [*out, _collectives_table(trace), _waits_table(trace)]


def summary(trace: StepTrace) -> list[str]:
    """What was traced, and the figures that matter first."""
    config, layout = trace.config, trace.layout
    work = total(trace.counter.work.values())
    bytes_sent = sum(call.bytes for call in trace.counter.collectives)
    unfused = work.launches - work.chained + work.chains
    return [
        f"rank {trace.rank} of {layout.layout.world_size}, {layout.layout}, layers {_ranges(trace.layers)}",
        f"one step of {layout.micro_batches:,} micro-batch{'es' * (layout.micro_batches > 1)} of "
        f"{config.training.micro_batch_size:,} x {config.data.sequence_length:,} tokens, {config.precision.compute}",
        f"{counted(work.launches, 'launch')} ({unfused:,} where elementwise chains are compiled), "
        f"{_amount(work.flops, 'FLOP')}, "
        f"{_amount(work.read, 'B')} read, {_amount(work.written, 'B')} written",
        f"{counted(len(trace.counter.collectives), 'collective')} of {_amount(bytes_sent, 'B')}",
        f"{counted(len(waits(trace)), 'wait')} of the host; in a layer's experts {waits_in_experts(trace):g} for each "
        "micro-batch",
        f"{counted(wide_kernels(trace), 'index kernel')} over tokens x experts",
    ]


def text(trace: StepTrace, recipe: str) -> str:
    lines = [recipe, *(f"  {line}" for line in summary(trace))]
    for table in tables(trace, operations=False):
        lines += ["", table.title, *_aligned(table)]
    return "\n".join([*lines, "", "assumed:", *(f"  {line}" for line in assumptions(trace))])


def _aligned(table: Table) -> list[str]:
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(trace: StepTrace, recipe: str, command: str) -> str:
    lines = [
        f"# A training step of {recipe}, counted",
        "",
        f"    {command}",
        "",
        *(f"* {line}" for line in summary(trace)),
    ]
    for table in tables(trace, operations=True):
        lines += [
            "",
            f"## {table.title.capitalize()}",
            "",
            f"| {' | '.join(table.header)} |",
            "|---" * len(table.header) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*lines, "", "## Assumed", "", *(f"* {line}" for line in assumptions(trace))]) + "\n"


def facts(trace: StepTrace) -> dict[str, Any]:
    """All counts, in bytes and FLOPs of the step, for JSON."""
    calls = Tally(_flat(call) for call in trace.counter.collectives)
    events = Tally(_flat(event) for event in trace.counter.events)
    return {
        "rank": trace.rank,
        "layout": asdict(trace.layout.layout),
        "layers": trace.layers,
        "micro_batches": trace.layout.micro_batches,
        "micro_batch_size": trace.config.training.micro_batch_size,
        "sequence_length": trace.config.data.sequence_length,
        "total": asdict(total(trace.counter.work.values())),
        "host_waits": len(waits(trace)),
        "host_waits_in_experts": waits_in_experts(trace),
        "wide_index_kernels": wide_kernels(trace),
        "operations": [
            {**asdict(place), "operation": op, **asdict(work)} for (place, op), work in trace.counter.work.items()
        ],
        "collectives": [dict(call) | {"count": count} for call, count in calls.items()],
        "events": [dict(event) | {"count": count} for event, count in events.items()],
        "assumed": assumptions(trace),
    }


def _flat(one: Collective | Event) -> tuple[tuple[str, Any], ...]:
    values = asdict(one)
    return tuple((values.pop("place") | values).items())
