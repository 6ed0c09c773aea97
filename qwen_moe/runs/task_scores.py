"""The results of `qwen-moe evaluate tasks` in a run's folder: scores by checkpoint, as text and as curves."""

from pathlib import Path
from typing import Any

from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError

FOLDER = "evaluation/tasks"
RESULTS_PREFIX = "results-"


def main_score(record: dict[str, Any]) -> dict[str, Any] | None:
    """Of a task's results the metric that its file names first; None if it has no value."""
    found = next(iter(record.get("metrics") or ()), None)
    return found if found is not None and found["value"] is not None else None


def read(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """By task, the first metric at each step: ``step``, ``metric``, ``value`` and ``stderr``, in order. Raises UserError for
    a damaged file."""
    scores: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((run_dir / FOLDER).glob(f"{RESULTS_PREFIX}*.json")):
        results = json_object(read_text(path, "results", "`qwen-moe evaluate tasks` again"), str(path))
        try:
            step = results["checkpoint"]["step"]
            if step is None:
                continue
            for task, record in results["tasks"].items():
                if (score := main_score(record)) is not None:
                    point = {"step": int(step), **{name: score[name] for name in ("metric", "value", "stderr")}}
                    scores.setdefault(task, []).append(point)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): remove it, and evaluate its checkpoint again") from None
    return {task: sorted(points, key=lambda point: point["step"]) for task, points in sorted(scores.items())}


def as_lines(scores: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The last score of each task, and from where it came."""
    lines = []
    for task, points in scores.items():
        last, error = points[-1], points[-1]["stderr"]
        text = f"{last['value']:.4f}" + ("" if error is None else f" +- {error:.4f}")
        first = f", {points[0]['value']:.4f} at step {points[0]['step']:,}" if len(points) > 1 else ""
        lines.append(f"  task              {task}: {last['metric']} {text} at step {last['step']:,}{first}")
    return lines


def drawn(scores: dict[str, list[dict[str, Any]]]) -> Any:
    """A figure with a panel for each metric and a curve for each task, with bars of one standard error up and down."""
    import matplotlib.pyplot as plt

    metrics = list(dict.fromkeys(points[-1]["metric"] for points in scores.values()))
    figure, panels = plt.subplots(
        len(metrics), 1, figsize=(8, 1 + 3 * len(metrics)), sharex=True, squeeze=False, layout="constrained"
    )
    for metric, axes in zip(metrics, panels[:, 0], strict=True):
        for task, points in scores.items():
            if points[-1]["metric"] != metric:
                continue
            steps, values = [point["step"] for point in points], [point["value"] for point in points]
            errors = [point["stderr"] or 0.0 for point in points]
            label = f"{task} (last {values[-1]:.3f})"
            axes.errorbar(steps, values, yerr=errors, marker="o", linewidth=1, capsize=3, label=label)
        axes.set_ylabel(metric)
        axes.legend()
        axes.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("step")
    return figure
