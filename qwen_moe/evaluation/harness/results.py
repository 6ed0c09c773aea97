"""From the harness's results to a file for each checkpoint, with what another run needs to compare, and to tables."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json, write_text
from qwen_moe.documents import json_object, read_text
from qwen_moe.runs.task_scores import RESULTS_PREFIX, main_score

STDERR = "_stderr"


def task_record(name: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a task, or of a group of tasks, of ``found``, the harness's results. ``settings``: those of the
    command that decide the numbers."""
    higher = found.get("higher_is_better", {}).get(name) or {}
    metrics = []
    for key, value in found["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith(STDERR):
            continue
        error = found["results"][name].get(f"{metric}{STDERR},{chosen}")
        metrics.append(
            {
                "metric": metric,
                "filter": chosen,
                "value": _number(value),
                "stderr": _number(error),
                "higher_is_better": higher.get(metric),
            }
        )
    counts = found.get("n-samples", {}).get(name) or {}
    record = {
        "version": found.get("versions", {}).get(name),
        "num_fewshot": found.get("n-shot", {}).get(name),
        "samples": counts.get("effective"),
        "of": counts.get("original"),
        "metrics": metrics,
        **settings,
    }
    samples = (found.get("samples") or {}).get(name)
    if samples:
        hashes = sorted({sample["doc_hash"] for sample in samples})
        record["documents_sha256"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return record


def _number(value: Any) -> float | None:
    """The harness writes "N/A" for a standard error that it does not know."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def write_results(path: Path, checkpoint: dict[str, Any], harness: str, tasks: dict[str, Any]) -> dict[str, Any]:
    """Write the results of a checkpoint. Tasks of earlier evaluations of the same weights in the same way stay."""
    earlier: dict[str, Any] = {}
    if path.is_file():
        there = json_object(read_text(path, "results", "another --output"), str(path))
        same = isinstance(there.get("checkpoint"), dict) and there["checkpoint"] | {"path": ""} == checkpoint | {
            "path": ""
        }
        if same and isinstance(there.get("tasks"), dict):
            earlier = there["tasks"]
    results = {"kind": "tasks", "harness": harness, "checkpoint": checkpoint, "tasks": earlier | tasks}
    write_json(path, results)
    return results


def write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """A file for each task: documents, requests, answers and scores, one JSON object a line."""
    for task, rows in samples.items():
        lines = "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{file_name(task)}.jsonl", lines)


def file_name(task: str) -> str:
    """A task's name as that of a file."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in task)


def results_file(output: Path, name: str) -> Path:
    return output / f"{RESULTS_PREFIX}{name}.json"


def as_table(tasks: Mapping[str, Any]) -> str:
    """One line for each metric of each task."""
    rows = [("task", "version", "examples", "samples", "metric", "value", "+-")]
    for name, record in tasks.items():
        for metric in record["metrics"]:
            label = metric["metric"] + ("" if metric["filter"] == "none" else f" ({metric['filter']})")
            rows.append(
                (
                    name,
                    _shown(record["version"]),
                    _shown(record["num_fewshot"]),
                    _shown(record["samples"]),
                    label,
                    _figure(metric["value"]),
                    _figure(metric["stderr"]),
                )
            )
    return aligned(rows, left={0, 4})


def as_comparison(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each checkpoint, with the first metric of each task. ``results``: by the checkpoint's name."""
    tasks = list(dict.fromkeys(task for one in results.values() for task in one["tasks"]))
    first = {task: main_score(one["tasks"][task]) for one in results.values() for task in one["tasks"]}
    rows = [("checkpoint", *(f"{task} {found['metric']}" if (found := first[task]) else task for task in tasks))]
    for name, one in results.items():
        cells = []
        for task in tasks:
            score = main_score(one["tasks"].get(task, {}))
            error = "" if score is None or score["stderr"] is None else f" +- {score['stderr']:.4f}"
            cells.append("" if score is None else _figure(score["value"]) + error)
        rows.append((name, *cells))
    return aligned(rows, left={0})


def aligned(rows: Sequence[tuple[str, ...]], left: set[int]) -> str:
    """``rows`` as text in columns, of which those in ``left`` begin together and the others end together."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
