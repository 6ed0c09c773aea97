"""The results of `qwen-moe evaluate tasks` in a run's folder: scores by checkpoint, as text and as curves."""

from pathlib import Path
from typing import Any

from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError

FOLDER = "evaluation/tasks"
RESULTS_PREFIX = "results-"
PICTURE = "tasks.png"


def main_score(record: dict[str, Any]) -> dict[str, Any] | None:
    """Of a task's results the metric that its file names first; None if it has no value."""
    found = next(iter(record.get("metrics") or ()), None)
    return found if found is not None and found["value"] is not None else None


def task_scores(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
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


def draw(scores: dict[str, list[dict[str, Any]]], axes: Any) -> None:
    """A curve for each task, with a bar of one standard error up and down."""
    for task, points in scores.items():
        steps, values = [point["step"] for point in points], [point["value"] for point in points]
        errors = [point["stderr"] or 0.0 for point in points]
        axes.errorbar(steps, values, yerr=errors, marker="o", capsize=3, label=f"{task} ({points[-1]['metric']})")
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.legend()
    axes.grid(alpha=0.3)
