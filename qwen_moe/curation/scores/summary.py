"""Figures of scored documents: of each dimension in all and by language, of domains, and of what failed."""

import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launchers.counted import counted
from qwen_moe.curation.scores.annotate import DOMAIN, ERROR, LEFT_OUT, MASS
from qwen_moe.curation.scores.wording import language_of

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 40
_NAMED = 8  # reasons of failures


def _numbers() -> "array.array[float]":
    return array.array("f")


@dataclass
class Found:
    """The scores of all documents. ``values``: by dimension and language, which is empty where it is not known."""

    documents: int = 0
    shortened: int = 0
    values: dict[str, dict[str, "array.array[float]"]] = field(default_factory=dict)
    mass: dict[str, "array.array[float]"] = field(default_factory=dict)
    domains: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, metadata: Mapping[str, Any]) -> None:
        self.documents += 1
        self.shortened += LEFT_OUT in metadata
        language = language_of(metadata)
        for name, value in (metadata.get("scores") or {}).items():
            self.values.setdefault(name, {}).setdefault(language, _numbers()).append(value)
        for name, value in (metadata.get(MASS) or {}).items():
            self.mass.setdefault(name, _numbers()).append(value)
        if isinstance(domain := metadata.get(DOMAIN), str):
            self.domains[domain] += 1
        if ERROR in metadata:
            self.errors[metadata[ERROR]] += 1

    def of(self, name: str) -> np.ndarray:
        """All scores of a dimension."""
        return np.concatenate([np.asarray(values, np.float64) for values in self.values[name].values()])


def collect(rows: Iterable[Mapping[str, Any]]) -> Found:
    found = Found()
    for row in rows:
        found.add(row["metadata"])
    return found


def summary(found: Found) -> dict[str, Any]:
    """As JSON."""
    scores = {}
    for name in sorted(found.values):
        values = found.of(name)
        one: dict[str, Any] = {
            "documents": len(values),
            "mean": float(values.mean()),
            "deviation": float(values.std()),
            "quantiles": {f"{q:g}": float(np.quantile(values, q)) for q in _QUANTILES},
            "least": float(values.min()),
            "most": float(values.max()),
            "histogram": _histogram(values),
        }
        if name in found.mass:
            one["probability_of_a_rating"] = float(np.mean(np.asarray(found.mass[name], np.float64)))
        languages = found.values[name]
        if set(languages) != {""}:
            one["languages"] = {
                language or "unknown": {"documents": len(part), "mean": float(np.mean(np.asarray(part, np.float64)))}
                for language, part in sorted(languages.items())
            }
        scores[name] = one
    return {
        "documents": found.documents,
        "shortened": found.shortened,
        "failed": found.errors.total(),
        "failures": dict(found.errors.most_common(_NAMED)),
        "scores": scores,
        "domains": dict(sorted(found.domains.items())),
    }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=_BINS)
    return {"edges": [float(edges[0]), float(edges[-1])], "counts": counts.tolist()}


def described(values: Mapping[str, Any]) -> str:
    """The summary as a table."""
    lines = []
    if values["scores"]:
        width = max(9, *(len(name) for name in values["scores"]))
        lines.append(f"{'dimension':{width}s} {'documents':>10s} {'mean':>8s} {'5%':>8s} {'median':>8s} {'95%':>8s}")
    for name, one in values["scores"].items():
        low, middle, high = (one["quantiles"][key] for key in ("0.05", "0.5", "0.95"))
        lines.append(f"{name:{width}s} {one['documents']:10,d} {one['mean']:8.3f} {low:8.3f} {middle:8.3f} {high:8.3f}")
        for language, part in one.get("languages", {}).items():
            lines.append(f"{f'  {language}':{width}s} {part['documents']:10,d} {part['mean']:8.3f}")
    for name, one in values["scores"].items():
        share = one.get("probability_of_a_rating")
        if share is not None and share < 0.5:
            lines.append(
                f"the model gives a rating only {share:.1%} of its probability in {name}: it may not follow the prompt"
            )
    if values["domains"]:
        total = sum(values["domains"].values())
        parts = (f"{name} {count:,} ({count / total:.1%})" for name, count in values["domains"].items())
        lines.append("domains: " + ", ".join(parts))
    if values["shortened"]:
        lines.append(
            f"{counted(values['shortened'], 'document was', 'documents were')} shortened in the middle for the model"
        )
    if values["failed"]:
        reasons = "; ".join(f"{counted(count, 'time')} {reason}" for reason, count in values["failures"].items())
        if others := values["failed"] - sum(values["failures"].values()):
            reasons += f"; {others:,} for other reasons"
        lines.append(f"{counted(values['failed'], 'document has', 'documents have')} no score: {reasons}")
    return "\n".join(lines)
