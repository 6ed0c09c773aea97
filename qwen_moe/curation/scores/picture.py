"""The picture of scored documents: a histogram of each dimension, by language where there are several, and the domains."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from launchers.counted import counted
from launchers.folder.atomic import replaced
from qwen_moe.curation.scores.summary import Found

_LANGUAGES, _DOMAINS, _BINS = 5, 20, 40


def draw(found: Found, path: Path) -> None:
    """Write a PNG. Does nothing if there are neither scores nor domains."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = sorted(found.values)
    count = len(names) + bool(found.domains)
    if not count:
        return
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    every = list(axes.flat)
    for name, place in zip(names, every, strict=False):
        _scores(place, name, found)
    if found.domains:
        _domains(every[len(names)], found)
    for place in every[count:]:
        place.set_axis_off()
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def _scores(place: Any, name: str, found: Found) -> None:
    values = found.of(name)
    low, high = (1.0, 5.0) if name in found.mass else (float(values.min()), float(values.max()))
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    by_language = sorted(found.values[name].items(), key=lambda item: -len(item[1]))
    if len(by_language) > 1:
        parts = {language or "unknown": np.asarray(part, np.float64) for language, part in by_language}
        shown = dict(list(parts.items())[:_LANGUAGES])
        if rest := [part for language, part in parts.items() if language not in shown]:
            shown[counted(len(rest), "other")] = np.concatenate(rest)
        labels = [f"{language} ({len(part):,})" for language, part in shown.items()]
        place.hist(list(shown.values()), bins=edges, stacked=True, label=labels)
        place.legend(fontsize=7, loc="upper right")
    else:
        place.hist(values, bins=edges)
    place.axvline(values.mean(), color="black", linewidth=1, linestyle="--")
    place.set_title(f"{name}: mean {values.mean():.3g} of {len(values):,}", fontsize=10)
    place.set_xlabel("score")
    place.set_ylabel("documents")


def _domains(place: Any, found: Found) -> None:
    most = found.domains.most_common(_DOMAINS)[::-1]
    place.barh([name for name, _ in most], [number for _, number in most])
    more = f", {_DOMAINS} of {len(found.domains)}" if len(found.domains) > _DOMAINS else ""
    place.set_title(f"domains{more}", fontsize=10)
    place.set_xlabel("documents")
    place.tick_params(axis="y", labelsize=8)
