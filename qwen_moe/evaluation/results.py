"""From answers to results.json and the printed table."""

from collections.abc import Callable
from typing import Any

from qwen_moe.evaluation.plan import Evaluation
from qwen_moe.evaluation.scoring import percent

RESULTS = "results.json"
# Figures of prompts that were read sparsely, and how the table names them.
SPARSE = {"kept": "attention kept", "kept_worst_layer": "in the worst layer", "work": "pairs against dense"}


def results_of(evaluation: Evaluation, identity: dict[str, str], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores in percent for every task, length and depth, and for every length. ``records``: one for each prompt."""
    cells: dict[tuple[str, int, float | None], list[dict[str, Any]]] = {}
    lengths: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["task"], record["length"], record["depth"]), []).append(record)
        lengths.setdefault(record["length"], []).append(record)
    return {
        "kind": evaluation.kind,
        "asked": evaluation.asked,
        **identity,
        "by_length": [{"length": length, **_figures(evaluation, some)} for length, some in lengths.items()],
        "scores": [
            {"task": task, "length": length, "depth": depth, **_figures(evaluation, some)}
            for (task, length, depth), some in cells.items()
        ],
    }


def _figures(evaluation: Evaluation, records: list[dict[str, Any]]) -> dict[str, Any]:
    """``exact``: the percentage of prompts whose answers were all right."""
    scores = [evaluation.tasks[record["task"]].score(record["completion"], record["answers"]) for record in records]
    return {
        "score": percent(scores),
        "exact": percent([float(score == 1) for score in scores]),
        "samples": len(records),
        "prompt_tokens": [min(record["tokens"] for record in records), max(record["tokens"] for record in records)],
        "seconds": round(sum(record["seconds"] for record in records), 3),
        **{
            name: round(sum(record[name] for record in records) / len(records), 4)
            for name in SPARSE
            if all(name in record for record in records)
        },
    }


def grid_of(results: dict[str, Any]) -> tuple[list[int], list[Any], list[list[float]]]:
    """Lengths, rows (depths of passkey, tasks of RULER), and the scores ``[row][length]``."""
    name = "depth" if results["kind"] == "passkey" else "task"
    lengths = list(dict.fromkeys(cell["length"] for cell in results["scores"]))
    rows = list(dict.fromkeys(cell[name] for cell in results["scores"]))
    scores = {(cell[name], cell["length"]): cell["score"] for cell in results["scores"]}
    return lengths, rows, [[scores[row, length] for length in lengths] for row in rows]


def as_text(results: dict[str, Any]) -> str:
    """A table with a column for each length."""
    lengths, rows, scores = grid_of(results)
    passkey = results["kind"] == "passkey"
    name: Callable[[Any], str] = (lambda depth: f"depth {depth:.0%}") if passkey else str
    samples = results["scores"][0]["samples"]
    title = "exact matches in percent" if passkey else "scores in percent (RULER's)"
    lines = [f"{results['kind']}: {title}, {samples} {'prompt' if samples == 1 else 'prompts'} for each cell"]
    labels = [name(row) for row in rows]
    by_length = results["by_length"]
    sparse = {name: label for name, label in SPARSE.items() if any(name in length for length in by_length)}
    left = max(len(label) for label in [*labels, "tokens", "mean", *sparse.values()])
    widths = [max(len(f"{length:,}"), 6) for length in lengths]

    def line(label: str, cells: list[str]) -> str:
        return "  ".join([label.ljust(left), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    lines.append(line("tokens", [f"{length:,}" for length in lengths]))
    lines += [line(label, [f"{score:.1f}" for score in row]) for label, row in zip(labels, scores, strict=True)]
    lines.append(line("mean", [f"{length['score']:.1f}" for length in by_length]))
    lines += [
        line(label, [f"{length[name]:.1%}" if name in length else "" for length in by_length])
        for name, label in sparse.items()
    ]
    return "\n".join(lines)
