"""Trains a classifier on documents that have scores or labels, and measures it on documents that it has not seen.

A hash of the text deals documents out: 80% to train on, 10% to choose the epoch, 10% to measure. So copies of a document
are never on both sides. The seed, the documents and the number of threads decide everything.
"""

import hashlib
import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from launchers.counted import counted
from qwen_moe.curation.scores.annotate import Doc
from qwen_moe.curation.scores.classifier import Classifier, Network, Shape, collated
from qwen_moe.curation.scores.features import Features, Hasher
from qwen_moe.errors import UserError
from qwen_moe.progress import bar

_TENTHS = 10
LEAST = 50  # documents


@dataclass(frozen=True, kw_only=True)
class Training:
    """``documents``: the most that are used; of more, those with the smallest hashes. ``learning_rate``: decays to 0."""

    seed: int = 0
    buckets: int = 1 << 18
    words: int = 4096
    hidden: int = 32
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 0.03
    documents: int = 200_000


@dataclass
class Examples:
    """Features with their targets: scores ``[n]`` by dimension, or the number of a class. ``tenths``: the part of each."""

    kind: str
    names: tuple[str, ...]
    features: list[Features] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    tenths: list[int] = field(default_factory=list)
    without: int = 0  # documents without a target
    seconds: float = 0.0  # of making the features

    def part(self, tenths: Iterable[int]) -> list[int]:
        wanted = set(tenths)
        return [number for number, tenth in enumerate(self.tenths) if tenth in wanted]

    def values(self, numbers: list[int]) -> torch.Tensor:
        dtype = torch.int64 if self.kind == "classes" else torch.float64
        return torch.tensor([self.targets[number] for number in numbers], dtype=dtype)


def gather(
    documents: Iterable[Doc], target: Callable[[Doc], Any], kind: str, training: Training, what: str = "a target"
) -> Examples:
    """The examples among ``documents``. ``target``: the scores of a document by dimension or its class; None if it has none.
    ``what``: these in messages. Raises UserError if there are too few."""
    hasher, without, seconds = Hasher(training.buckets, training.words), 0, 0.0
    kept: list[tuple[int, int, Any, Features]] = []
    for number, document in enumerate(documents):
        found = target(document)
        if found is None:
            without += 1
            continue
        digest = hashlib.blake2b(f"{training.seed} {document.text}".encode("utf-8", "surrogatepass"), digest_size=8)
        code = int.from_bytes(digest.digest())
        if len(kept) == training.documents and -code < kept[0][0]:
            continue
        begin = time.perf_counter()
        entry = (-code, -number, found, hasher(document.text))
        seconds += time.perf_counter() - begin
        (heapq.heappush if len(kept) < training.documents else heapq.heappushpop)(kept, entry)
    kept.sort(reverse=True, key=lambda entry: entry[:2])
    if len(kept) < LEAST:
        raise _too_few(len(kept), what, without)
    names = _names(kind, [entry[2] for entry in kept])
    examples = Examples(kind=kind, names=names, without=without, seconds=seconds)
    for code, _, found, features in kept:
        if kind == "scores" and not set(names) <= found.keys():
            examples.without += 1
            continue
        examples.features.append(features)
        examples.targets.append(names.index(found) if kind == "classes" else [float(found[name]) for name in names])
        examples.tenths.append(-code % _TENTHS)
    if len(examples.features) < LEAST:
        raise _too_few(len(examples.features), f"{what} in {', '.join(names)}", examples.without)
    return examples


def _too_few(found: int, what: str, without: int) -> UserError:
    return UserError(
        f"{counted(found, 'document has', 'documents have')} {what}, which the classifier is to learn, and {without:,} "
        f"{'has' if without == 1 else 'have'} not: give at least {LEAST} that have"
    )


def _names(kind: str, targets: list[Any]) -> tuple[str, ...]:
    """Classes; or the dimensions that most documents have."""
    if kind == "classes":
        names = tuple(sorted(set(targets)))
        if len(names) < 2:
            raise UserError(f"all documents are of the class {names[0]!r}: give documents of at least two classes")
        return names
    counts = Counter(name for target in targets for name in target)
    if names := tuple(sorted(name for name, count in counts.items() if 2 * count > len(targets))):
        return names
    name, count = min(counts.items(), key=lambda one: (-one[1], one[0]))
    raise UserError(
        f"no dimension is scored in more than half of {counted(len(targets), 'scored document')} ({name!r:.60}, the most "
        f"frequent, in {count:,}): give documents that are scored in the same dimensions"
    )


def train(examples: Examples, training: Training) -> tuple[Classifier, dict[str, Any]]:
    """The classifier, and its figures on the held-out tenth. Raises UserError if a target does not vary."""
    parts = [examples.part(tenths) for tenths in (range(8), [8], [9])]
    if any(len(part) < 2 for part in parts):
        raise UserError(
            f"{counted(len(examples.features), 'document is', 'documents are')} too few to hold a tenth out, with copies of "
            "a text in one part: give more different texts"
        )
    shape = _shape(examples, parts[0], training)
    generator = torch.Generator().manual_seed(training.seed)
    network = Network(shape)
    _draw(network, generator)
    classifier = Classifier(shape, network)
    targets = examples.values(list(range(len(examples.features))))
    if shape.kind == "scores":
        targets = (targets - torch.tensor(shape.means).double()) / torch.tensor(shape.deviations).double()
    steps = training.epochs * math.ceil(len(parts[0]) / training.batch_size)
    step = _Step(network, training.learning_rate, steps)
    best, weights, epoch_of_best = math.inf, {}, 0
    for epoch in bar(range(1, training.epochs + 1), "training the classifier", "epoch", training.epochs):
        network.train()
        order = torch.randperm(len(parts[0]), generator=generator).tolist()
        for first in range(0, len(order), training.batch_size):
            batch = [parts[0][number] for number in order[first : first + training.batch_size]]
            step(collated([examples.features[n] for n in batch]), targets[batch], shape.kind)
        chosen = _held_out_loss(network, examples, parts[1], targets, shape.kind)
        if chosen < best:
            best, epoch_of_best = chosen, epoch
            weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if not math.isfinite(best):
        raise UserError(f"the classifier's error is {best}: lower --learning-rate {training.learning_rate:g}")
    network.load_state_dict(weights)
    network.eval()
    figures = measure(classifier, examples, parts[2])
    counts = dict(zip(("trained_on", "chosen_by", "held_out"), map(len, parts), strict=True))
    return classifier, {**counts, "without": examples.without, "epoch": epoch_of_best, **figures}


def _shape(examples: Examples, trained: list[int], training: Training) -> Shape:
    sizes = {"buckets": training.buckets, "words": training.words, "hidden": training.hidden}
    if examples.kind == "classes":
        return Shape(kind="classes", names=examples.names, **sizes)
    values = examples.values(trained)
    means, deviations = values.mean(0), values.std(0)
    for name, deviation in zip(examples.names, deviations.tolist(), strict=True):
        if not math.isfinite(deviation):
            raise UserError(f"the scores in {name} are too large to be learned: divide them by a number")
        if not deviation > 1e-9:
            raise UserError(f"all documents have the same score in {name}: there is nothing to learn")
    return Shape(
        kind="scores", names=examples.names, means=tuple(means.tolist()), deviations=tuple(deviations.tolist()), **sizes
    )


def _draw(network: Network, generator: torch.Generator) -> None:
    """Of a linear map nothing is random. Through a hidden layer, outputs begin near 0."""
    with torch.no_grad():
        if network.output is None:
            network.words.weight.zero_()
            return
        network.words.weight.normal_(0, 0.5, generator=generator)
        network.output.weight.normal_(0, network.output.in_features**-0.5 / 2, generator=generator)
        network.output.bias.zero_()


class _Step:
    """One step of Adam. Of the table of words it changes the rows that a batch has, and no others: torch's SparseAdam does
    the same and is many times slower. The learning rate decays to 0 over ``steps``."""

    def __init__(self, network: Network, learning_rate: float, steps: int) -> None:
        self._network, self._rate = network, learning_rate
        others = [parameter for name, parameter in network.named_parameters() if name != "words.weight"]
        self._others = torch.optim.Adam(others, lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._others, lambda step: 1 - step / steps)
        self._table = network.words.weight.detach()
        self._first, self._second = torch.zeros_like(self._table), torch.zeros_like(self._table)
        self._count = 0

    def __call__(self, features: tuple[torch.Tensor, ...], targets: torch.Tensor, kind: str) -> None:
        buckets, offsets, weights = features
        rows, places = buckets.unique(return_inverse=True)
        table = self._table[rows].requires_grad_()
        self._others.zero_grad()
        (_loss(self._network.of_table(table, places, offsets, weights), targets, kind) / len(targets)).backward()
        rate = float(self._schedule.get_last_lr()[0])
        self._others.step()
        self._schedule.step()
        assert table.grad is not None
        self._change(rows, table.grad, rate)

    def _change(self, rows: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        self._count += 1
        first = self._first[rows].lerp_(gradient, 0.1)
        second = self._second[rows].lerp_(gradient.square(), 0.001)
        self._first[rows], self._second[rows] = first, second
        scale = rate * math.sqrt(1 - 0.999**self._count) / (1 - 0.9**self._count)
        self._table[rows] -= scale * first / (second.sqrt() + 1e-8)


def _loss(output: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """The summed error of a batch."""
    if kind == "classes":
        return F.cross_entropy(output, targets, reduction="sum")
    return F.mse_loss(output, targets.float(), reduction="sum")


@torch.no_grad()
def _held_out_loss(network: Network, examples: Examples, numbers: list[int], targets: torch.Tensor, kind: str) -> float:
    network.eval()
    total = 0.0
    for first in range(0, len(numbers), 512):
        some = numbers[first : first + 512]
        total += float(_loss(network(*collated([examples.features[n] for n in some])), targets[some], kind))
    return total / len(numbers)


def measure(classifier: Classifier, examples: Examples, numbers: list[int]) -> dict[str, Any]:
    """How well ``numbers`` are predicted: of scores the correlation, the root mean squared error and that of the mean; of
    classes the accuracy, that of the most frequent class, and the recall of each."""
    found = classifier.predict([examples.features[number] for number in numbers])
    targets = examples.values(numbers)
    if examples.kind == "classes":
        right = found.argmax(1) == targets
        recall = {
            name: float(right[targets == number].double().mean()) if bool((targets == number).any()) else None
            for number, name in enumerate(examples.names)
        }
        most = Counter(targets.tolist()).most_common(1)[0][1]
        return {"accuracy": float(right.double().mean()), "most_frequent": most / len(numbers), "recall": recall}
    by_name = {}
    for column, name in enumerate(examples.names):
        x, y = found[:, column], targets[:, column]
        by_name[name] = {
            "correlation": correlation(x, y),
            "error": float((x - y).square().mean().sqrt()),
            "error_of_mean": float((y - y.mean()).square().mean().sqrt()),
        }
    return {"scores": by_name}


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def described(figures: dict[str, Any]) -> str:
    """The figures as lines."""
    lines = [
        f"trained on {counted(figures['trained_on'], 'document')}, measured on {counted(figures['held_out'], 'other')}"
    ]
    for name, one in figures.get("scores", {}).items():
        lines.append(
            f"{name}: correlation {one['correlation']:.3f}, error {one['error']:.3f} (of the mean: "
            f"{one['error_of_mean']:.3f})"
        )
    if "accuracy" in figures:
        lines.append(f"accuracy {figures['accuracy']:.1%} (of the most frequent class: {figures['most_frequent']:.1%})")
        of_classes = (
            (name, "none held out" if one is None else f"{one:.1%}") for name, one in figures["recall"].items()
        )
        lines.append("found: " + ", ".join(f"{name} {text}" for name, text in of_classes))
    return "\n".join(lines)


def warning(figures: dict[str, Any]) -> str:
    """What to say of a classifier that has learned nothing, by its figures on held-out documents; empty if it has."""
    bad = [name for name, one in figures.get("scores", {}).items() if not one["error"] < one["error_of_mean"]]
    told = f"no nearer to {', '.join(bad)} than their mean is" if bad else ""
    if "accuracy" in figures and not figures["accuracy"] > figures["most_frequent"]:
        told = "no more often right than the most frequent class is"
    if not told:
        return ""
    held_out = counted(figures["held_out"], "held-out document")
    return f"note: of {held_out}, the classifier is {told}: keep or drop nothing by it, and train on more documents"
