"""The picture of a curation: documents after each step, domains before and after weights, histograms of scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.folder.atomic import replaced

_MOST = 12  # domains in the legend; the others are one


def draw(
    left: Sequence[tuple[str, Mapping[str, int]]],
    domains: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, int]],
    path: Path,
) -> None:
    """``left``: documents by domain after each step. ``domains``: what the weights did to each. ``scores``: how many
    documents have each value, by dimension."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = 1 + bool(domains)
    rows = 1 + -(-len(scores) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.2 * columns, 3.9 * rows), layout="constrained", squeeze=False)
    flat = list(axes.flat)
    colors = _colors(left, domains, plt.get_cmap("tab20"))
    _steps(flat[0], left, colors)
    if domains:
        _before_and_after(flat[1], domains, colors)
    for axis, (name, counts) in zip(flat[columns:], sorted(scores.items())):
        values = [float(value) for value in counts]
        axis.hist(values, weights=list(counts.values()), bins=30, color="#2a6f97")
        axis.set_title(f"score: {name}", fontsize=10)
        axis.set_ylabel("documents")
    for axis in flat[columns + len(scores) :]:
        axis.set_visible(False)
    for axis in flat:
        axis.spines[["top", "right"]].set_visible(False)
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)


def _colors(left: Sequence[tuple[str, Mapping[str, int]]], domains: Mapping[str, Any], map: Any) -> dict[str, Any]:
    names = sorted({name for _, counts in left for name in counts} | set(domains))
    return {name: map((2 * number) % 20 + (number >= 10)) for number, name in enumerate(names)}


def _steps(axis: Any, left: Sequence[tuple[str, Mapping[str, int]]], colors: Mapping[str, Any]) -> None:
    """Stacked bars, one for each step."""
    bottoms = [0] * len(left)
    for number, (name, color) in enumerate(colors.items()):
        heights = [counts.get(name, 0) for _, counts in left]
        label = name if number < _MOST else "_" + name
        axis.barh(range(len(left)), heights, left=bottoms, color=color, label=label, height=0.7)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    most = max([*bottoms, 1])
    for place, total in enumerate(bottoms):
        axis.annotate(f"{total:,}", (total, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(left)), [name for name, _ in left])
    axis.invert_yaxis()
    axis.set_xlim(0, most * 1.15)
    axis.set_xlabel("documents")
    axis.set_title("documents left after each step", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)


def _before_and_after(axis: Any, domains: Mapping[str, Mapping[str, Any]], colors: Mapping[str, Any]) -> None:
    """Shares of tokens of each domain, before and after, with the target as a line."""
    before = sum(share["tokens"] for share in domains.values())
    after = sum(share["tokens_after"] for share in domains.values())
    for place, (name, share) in enumerate(domains.items()):
        pair = (share["tokens"] / before, share["tokens_after"] / after)
        axis.bar([place - 0.2, place + 0.2], pair, width=0.38, color=colors[name], alpha=1.0, edgecolor="white")
        axis.bar([place - 0.2], pair[:1], width=0.38, color="white", alpha=0.55)
        if share["target"] is not None:
            axis.plot([place, place + 0.4], [share["target"]] * 2, color="black", linewidth=1.5)
        axis.annotate(
            f"x{share['repeats']:.2f}",
            (place + 0.2, pair[1]),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_xticks(range(len(domains)), list(domains), rotation=20 if len(domains) > 4 else 0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_ylabel("share of tokens")
    axis.set_title("domains before (pale) and after weights; line: target", fontsize=10)
