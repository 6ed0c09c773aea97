"""Documents packed into rows and micro-batches by hand, and an objective's loss over all of them.

What padding and tokens without a valid label hold of other fields is NaN: nothing may read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from parallel.sequence import Batch, SequenceShard
from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.objectives.base import Objective

Document = dict[
    str, torch.Tensor
]  # fields [n, ...] of a document's tokens: labels, log_probs and what the objective reads


@dataclass(frozen=True)
class Cut:
    """How items (a document, or the two of a pair) become a batch: their order, how many are in each row, the padding of
    each row, and how many rows are in each micro-batch."""

    order: list[int]
    rows: list[int]
    padding: list[int]
    micro_batches: list[int]


@st.composite
def cuts(draw: st.DrawFn, items: int) -> Cut:
    def sizes(total: int) -> list[int]:
        found = []
        while sum(found) < total:
            found.append(draw(st.integers(1, total - sum(found))))
        return found

    rows = sizes(items)
    padding = [draw(st.integers(0, 5)) for _ in rows]
    return Cut(draw(st.permutations(range(items))), rows, padding, sizes(len(rows)))


def plain(items: int) -> Cut:
    """Each item in a row of its own."""
    return Cut(list(range(items)), [1] * items, [0] * items, [1] * items)


def _padding(name: str, like: torch.Tensor, length: int) -> torch.Tensor:
    fill = float("nan") if like.is_floating_point() else IGNORE
    if name == "preferences":
        fill = 0.0  # by its definition
    return torch.full((length, *like.shape[1:]), fill, dtype=like.dtype)


def _row(documents: Sequence[Document], length: int) -> Batch:
    used = sum(len(document["labels"]) for document in documents)
    fields = {}
    for name in documents[0]:
        parts = [document[name] for document in documents]
        fields[name] = torch.cat([*parts, _padding(name, parts[0], length - used)])
    ends = torch.zeros(length, dtype=torch.bool)
    ends[torch.tensor([len(document["labels"]) for document in documents]).cumsum(0) - 1] = True
    counted = torch.arange(length) < used
    return fields | {name: field[0] for name, field in documents_of(ends[None]).items()} | {"counted": counted}


def batches(items: Sequence[Sequence[Document]], cut: Cut) -> list[Batch]:
    """Micro-batches with the fields of the documents of ``items``."""
    left = [items[index] for index in cut.order]
    rows = []
    for size in cut.rows:
        rows.append([document for item in left[:size] for document in item])
        left = left[size:]
    found, begin = [], 0
    for size in cut.micro_batches:
        part, padding = rows[begin : begin + size], cut.padding[begin : begin + size]
        lengths = [sum(len(d["labels"]) for d in row) + extra for row, extra in zip(part, padding, strict=True)]
        packed = [_row(row, max(lengths)) for row in part]
        found.append({name: torch.stack([row[name] for row in packed]) for name in packed[0]})
        begin += size
    return found


def mean_loss(
    objective: Objective, items: Sequence[Sequence[Document]], cut: Cut, output: str = "log_probs"
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss and the metrics of a step over ``items``; ``output``: the field that the model's output is in."""
    micro_batches = batches(items, cut)
    total, named = torch.zeros((), dtype=torch.float64), dict.fromkeys(objective.metrics, 0.0)
    count = sum(int(objective.count(batch)) for batch in micro_batches)
    for batch in micro_batches:
        valid = (batch["labels"] >= 0).view(*batch["labels"].shape, *[1] * (batch[output].ndim - 2))
        head = batch[output].where(valid, 0.0) if output == "log_probs" else batch[output]
        loss, values = objective.loss(head, batch, SequenceShard())
        total = total + loss / count
        for name in named:
            named[name] += float(values[name].detach()) / count
    return total, named


def learned(length: int, prompt: int, generator: torch.Generator) -> torch.Tensor:
    """Labels ``[length]`` of a document whose first ``prompt`` tokens and end are not learned."""
    labels = torch.randint(0, 50, (length,), generator=generator)
    labels[:prompt], labels[-1] = IGNORE, IGNORE
    return labels


def random_field(
    labels: torch.Tensor, generator: torch.Generator, scale: float = 1.0, mean: float = 0.0
) -> torch.Tensor:
    """Float64 values at valid labels, NaN at the others."""
    values = mean + scale * torch.randn(labels.shape, generator=generator, dtype=torch.float64)
    return values.where(labels >= 0, float("nan"))
