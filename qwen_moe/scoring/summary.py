"""How well scores agree with the judgments of pairs: accuracy and calibration by criterion."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_moe.data.conversations import PREFERENCE
from qwen_moe.objectives.reward import Calibration, calibration

WEIGHTED = "weighted"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of the pairs that were judged by a criterion: ``accuracy`` is the share whose better answer has the higher score (half
    for equal scores), ``confidence`` the mean probability that the model gives to its own order, ``calibration`` by how
    sure it is."""

    judged: int
    accuracy: float
    confidence: float
    calibration: Calibration

    def figures(self) -> dict[str, Any]:
        return {
            "judged": self.judged,
            "accuracy": self.accuracy,
            "confidence": self.confidence,
            "calibration_error": self.calibration.error,
        }


Pair = tuple[dict[str, int], dict[str, Any], dict[str, Any]]


def agreements(criteria: Sequence[str], pairs: Iterable[Pair]) -> dict[str, Agreement]:
    """By criterion, for those by which pairs were judged. ``pairs``: the judgments of each (1: the first answer is better,
    -1: the second is), and the scores of its first and second answer by criterion, with ``weighted``.

    The weighted score is compared with the judgment `PREFERENCE`, unless that is one of several criteria of its own.
    """
    differences: dict[str, list[float]] = {name: [] for name in (*criteria, WEIGHTED)}
    for judged, first, second in pairs:
        for name in criteria:
            if value := judged.get(name, 0):
                differences[name].append(value * (first[name] - second[name]))
        if (value := judged.get(PREFERENCE, 0)) and PREFERENCE not in criteria:
            differences[WEIGHTED].append(value * (first[WEIGHTED] - second[WEIGHTED]))
    return {name: _agreement(torch.tensor(z, dtype=torch.float64)) for name, z in differences.items() if z}


def by_kind(criteria: Sequence[str], pairs: Sequence[Pair], kinds: Sequence[Any]) -> dict[str, dict[str, Agreement]]:
    """The `agreements` of the pairs of each kind; ``kinds``: that of each pair. Pairs whose kind is no text are left out."""
    groups: dict[str, list[Pair]] = {}
    for pair, kind in zip(pairs, kinds, strict=True):
        if isinstance(kind, str):
            groups.setdefault(kind, []).append(pair)
    found = {kind: agreements(criteria, some) for kind, some in sorted(groups.items())}
    return {kind: of for kind, of in found.items() if of}


def _agreement(z: torch.Tensor) -> Agreement:
    right = (z > 0).double() + 0.5 * (z == 0).double()
    return Agreement(
        judged=len(z),
        accuracy=float(right.mean()),
        confidence=float(z.abs().sigmoid().mean()),
        calibration=calibration(z),
    )


def table(found: dict[str, Agreement]) -> str:
    """One line for each criterion."""
    width = max(9, *map(len, found))
    lines = [f"{'criterion':{width}s} {'pairs':>8s} {'accuracy':>9s} {'confidence':>11s} {'calibration error':>18s}"]
    for name, one in found.items():
        lines.append(
            f"{name:{width}s} {one.judged:8,d} {one.accuracy:9.1%} {one.confidence:11.1%} {one.calibration.error:18.1%}"
        )
    return "\n".join(lines)


def kinds_table(found: dict[str, dict[str, Agreement]]) -> str:
    """One line for each kind of pairs and criterion."""
    first, second = max(4, *map(len, found)), max(9, *(len(name) for of in found.values() for name in of))
    lines = [f"{'kind':{first}s} {'criterion':{second}s} {'pairs':>8s} {'accuracy':>9s}"]
    for kind, of in found.items():
        for name, one in of.items():
            lines.append(f"{kind:{first}s} {name:{second}s} {one.judged:8,d} {one.accuracy:9.1%}")
    return "\n".join(lines)
