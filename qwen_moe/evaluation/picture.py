"""The heat map of an evaluation: scores by length, and by depth (passkey) or task (RULER)."""

import sys
from pathlib import Path
from typing import Any

from launchers.folder.atomic import replaced
from qwen_moe.evaluation.results import grid_of
from qwen_moe.packages import missing_text

PICTURE = "heatmap.png"


def draw_if_possible(results: dict[str, Any], output: Path) -> Path | None:
    """Draw the picture and return its path. If it cannot be drawn, print one line to stderr: results do not depend on it."""
    if missing := missing_text("matplotlib"):
        print(f"no picture: {missing}; then the same command draws it", file=sys.stderr)
        return None
    try:
        return draw(results, output / PICTURE)
    except Exception as error:  # a full disk, or a broken matplotlib
        print(f"no picture: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def draw(results: dict[str, Any], path: Path) -> Path:
    """Green is 100 percent, red is 0. The beginning of the text is at the top."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lengths, rows, scores = grid_of(results)
    passkey = results["kind"] == "passkey"
    size = (max(5.0, 2.6 + 0.85 * len(lengths)), max(2.6, 1.5 + 0.34 * len(rows)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(scores, aspect="auto", cmap="RdYlGn", vmin=0, vmax=100, interpolation="nearest")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row:.0%}" if passkey else row for row in rows], fontsize=8)
    axes.set_xlabel("tokens of prompt and completion")
    axes.set_ylabel("depth of the key" if passkey else "task")
    if len(lengths) * len(rows) <= 400:
        for number, row in enumerate(scores):
            for place, score in enumerate(row):
                color = "black" if 15 < score < 85 else "white"
                axes.text(place, number, f"{score:.0f}", ha="center", va="center", fontsize=7, color=color)
    samples = results["scores"][0]["samples"]
    what = "passkey, exact matches" if passkey else "RULER, scores"
    axes.set_title(f"{what} in percent; {samples} prompt{'s' * (samples > 1)} a cell", fontsize=10)
    figure.colorbar(image, ax=axes)
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return path
