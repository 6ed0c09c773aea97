"""`qwen-moe scaling collect`: makes the table that `scaling fit` reads from run folders, and says which runs it leaves out.

The loss of a run is its training loss averaged over the last 2% of its steps, at least 10. Public sweeps (Step Law, arXiv
2503.04715) also give a smoothed final training loss, with an unpublished window. With ``--loss validation`` it is the loss
on the validation sequences after the last step, which is better if there are many of them and batches are small.
"""

import argparse
import csv
import io
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launchers.counted import counted
from qwen_moe.config import RunConfig, load_config
from qwen_moe.errors import UserError

WINDOW_SHARE, LEAST_STEPS = 0.02, 10
MOST_SHARE = 0.05  # of a run's steps, over which its loss may be averaged without a note
NOISY = 5e-3  # of a loss; the fit expects that equal runs differ by 0.15%
Loss = Literal["train", "validation"]


def register(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    collect = verbs.add_parser("collect", help="make the table that `fit` reads from run folders")
    collect.add_argument(
        "runs", nargs="+", type=Path, metavar="LADDER_DIR|RUN_DIR", help="a folder of recipes, or run folders"
    )
    collect.add_argument("--output", type=Path, required=True, metavar="RUNS.csv")
    collect.add_argument(
        "--loss",
        choices=("train", "validation"),
        default="train",
        help="train: mean of the last 2%% of steps; validation: after the last step (default: train)",
    )
    collect.add_argument("--json", action="store_true", help="print the result as JSON")
    collect.set_defaults(func=run)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The ``rows`` of the table, (run, state, why) of each run ``left_out``, and ``notes`` on the runs in the table."""

    rows: list[dict[str, Any]]
    left_out: list[tuple[str, str, str]]
    notes: list[str]


def run(args: argparse.Namespace) -> int:
    found = collect(args.runs, args.loss)
    write_table(found, args.output)
    diverged = sum(bool(row["diverged"]) for row in found.rows)
    if args.json:
        left_out = [{"run": name, "state": state, "why": why} for name, state, why in found.left_out]
        facts = {"runs": len(found.rows), "diverged": diverged, "left_out": left_out, "notes": found.notes}
        print(json.dumps(facts | {"output": str(args.output)}))
        return 0
    for line in text(found):
        print(line)
    print(
        f"{args.output}: {counted(len(found.rows), 'run')}, {diverged} of them diverged; {len(found.left_out)} left out"
    )
    return 0


def text(found: Collected) -> list[str]:
    """A line for each run that is not in the table or diverged, with the reason, then the notes."""
    lines = [f"{name}: {state}{': ' if why else ''}{why}" for name, state, why in found.left_out]
    lines += [f"{row['run']}: diverged: {row['why']}" for row in found.rows if row["diverged"]]
    return lines + [f"note: {note}" for note in found.notes]


def _runs_of(path: Path) -> list[tuple[str, Path, RunConfig]]:
    """(name, run folder, config) of a run folder, or of every recipe in a folder of recipes."""
    from qwen_moe.launch.folder import open_folder
    from qwen_moe.runs.records import RESOLVED

    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a folder of recipes that were run, or the run_dir of a run")
    if (path / RESOLVED).is_file():
        return [(str(path), path, load_config(path / RESOLVED))]
    return [(entry.name, entry.config.run_dir, entry.config) for entry in open_folder(path, [])]


def collect(paths: Sequence[Path], loss: Loss) -> Collected:
    """Read every run. Raises UserError if none can be used or if their losses cannot be compared."""
    from qwen_moe.runs.outcome import read_outcome

    rows: list[dict[str, Any]] = []
    left_out: list[tuple[str, str, str]] = []
    notes: list[str] = []
    vocabularies: dict[int, str] = {}
    repeated, short, used = [], [], list[tuple[str, RunConfig]]()
    given = {run_dir.resolve(): (name, run_dir, config) for path in paths for name, run_dir, config in _runs_of(path)}
    for name, run_dir, config in given.values():
        if unusable := _unusable(config, run_dir):
            left_out.append((name, *unusable))
            continue
        outcome = read_outcome(config, run_dir)
        if outcome.state in ("missing", "unfinished"):
            left_out.append((name, outcome.state, outcome.why))
            continue
        row = _settings(name, config) | {"diverged": outcome.state == "diverged", "why": outcome.why}
        if outcome.state == "complete":
            measured = final_loss(outcome.records, config, loss)
            if measured is None:
                left_out.append((name, "no validation loss", "none after the last step: give --loss train"))
                continue
            row["loss"], row["loss_stderr"] = measured
            guess = config.objective.loss_of_guessing(config.model.vocab_size)
            if not measured[0] < guess:  # one last step below it does not make a run that converged
                why = f"its loss is {measured[0]:.3g}, and guessing gives {guess:.3g}"
                row |= {"loss": None, "loss_stderr": None, "diverged": True, "why": why}
            elif loss == "train" and math.ceil(LEAST_STEPS / MOST_SHARE) > config.train_steps:
                short.append(name)
        rows.append(row)
        used.append((name, config))
        vocabularies.setdefault(config.model.vocab_size, name)
        if available := _repeats(config):
            row["unique_tokens"] = available
            repeated.append(name)
    if len(vocabularies) > 1:
        sizes = ", ".join(f"{size:,} ({name})" for size, name in vocabularies.items())
        raise UserError(f"losses with different vocabularies cannot be compared: {sizes}; collect each apart")
    _check_usable(paths, rows, left_out)
    if repeated:
        notes.append(
            f"{counted(len(repeated), 'run reads', 'runs read')} data more than once "
            f"({repeated[0]}, ...): see the column unique_tokens"
        )
    if short:
        notes.append(
            f"{counted(len(short), 'run has', 'runs have')} fewer than "
            f"{counted(math.ceil(LEAST_STEPS / MOST_SHARE), 'step')} ({short[0]}, ...): the mean of "
            f"their last {LEAST_STEPS} is above the loss they ended with, which makes large batches look worse: --loss "
            "validation has no such mean"
        )
    notes += _different_data(used)
    return Collected(rows=rows, left_out=left_out, notes=notes + _noise(rows))


def _check_usable(
    paths: Sequence[Path], rows: Sequence[dict[str, Any]], left_out: Sequence[tuple[str, str, str]]
) -> None:
    """Raises UserError if the table would have no loss."""
    if rows and all(row["diverged"] for row in rows):
        raise UserError(
            f"no run of {', '.join(map(str, paths))} has a loss to fit: those that ended diverged ({rows[0]['run']}: "
            f"{rows[0]['why']}); run some with lower learning rates"
        )
    if not rows:
        why = "; ".join(f"{name} {state}" for name, state, _ in left_out[:5])
        command = f"qwen-moe launch {shlex.quote(str(paths[0]))} --local"
        raise UserError(f"no run of {', '.join(map(str, paths))} has ended ({why}): `{command}` runs them")


def _unusable(config: RunConfig, run_dir: Path) -> tuple[str, str] | None:
    """(state, why) of a run whose losses the table cannot have, however it ended."""
    from qwen_moe.runs.outcome import difference

    if config.stages:
        return "stages", "its losses are of sequences of several lengths"
    if (unit := config.objective.unit) != "nats per token":
        return "objective", f"the loss of {config.objective.kind} is in {unit}, and the table's in nats per token"
    if changed := difference(config, run_dir):
        return "other settings", f"{run_dir} was not run with this recipe: {changed}"
    return None


def _different_data(runs: Sequence[tuple[str, RunConfig]]) -> list[str]:
    """A note if runs of the table trained on different data, whose losses cannot be compared."""
    from qwen_moe.data.inputs import train_datasets

    first: dict[tuple[str, ...], str] = {}
    for name, config in runs:
        data = sorted(f"{one.prefix} (weight {one.weight:g})" for one in train_datasets(config))
        first.setdefault((config.objective.kind, *data), name)
    if len(first) < 2:
        return []
    told = "; ".join(f"{name}: {kind} on {', '.join(data)}" for (kind, *data), name in list(first.items())[:3])
    return [
        f"not all runs trained on the same data ({told}): their losses can be compared only if they are of the same text; "
        "else collect each apart"
    ]


def _noise(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A note if the final training losses are too uncertain for a fit to compare them."""
    errors = sorted(row["loss_stderr"] / row["loss"] for row in rows if row.get("loss_stderr") and row.get("loss"))
    middle = errors[len(errors) // 2] if errors else 0.0
    if middle <= NOISY:
        return []
    return [
        f"the final training losses have a standard error of {middle:.1%} in the median, because batches are small: "
        "--loss validation compares all runs on the same sequences"
    ]


def final_loss(records: Sequence[dict[str, Any]], config: RunConfig, loss: Loss) -> tuple[float, float | None] | None:
    """(loss, its standard error if known) in nats per token; None if the validation loss is missing."""
    if loss == "validation":
        found = [r["validation_loss"] for r in records if "validation_loss" in r and r["step"] == config.train_steps]
        return (float(found[-1]), None) if found else None
    window = max(LEAST_STEPS, math.ceil(WINDOW_SHARE * config.train_steps))
    losses = [float(record["loss"]) for record in records if "loss" in record][-window:]
    mean = sum(losses) / len(losses)
    if len(losses) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in losses) / (len(losses) - 1)
    return mean, math.sqrt(variance / len(losses)) or None


def _settings(name: str, config: RunConfig) -> dict[str, Any]:
    from qwen_moe.models.flops import count_parameters

    model, optimizer, size = config.model, config.optimizer, count_parameters(config.model)
    return {
        "run": name,
        "n_total": size.non_vocabulary_total,
        "n_active": size.non_vocabulary_activated,
        "tokens": config.training.train_tokens,
        "seq_len": config.data.sequence_length,
        "learning_rate": optimizer.learning_rate,
        "batch_size": config.training.global_batch_size,
        "loss": None,
        "diverged": False,
        "loss_stderr": None,
        "num_experts": model.num_experts or None,
        "top_k": model.num_experts_per_tok or None,
        "shared_hidden": model.shared_expert_intermediate_size,
        "schedule": config.schedule.kind,
        "min_learning_rate": config.schedule.min_learning_rate or None,
        "warmup_tokens": config.schedule.warmup_tokens,
        "weight_decay": optimizer.weight_decay,
        "beta2": optimizer.beta2,
        "seed": config.seed,
        "vocab_size": model.vocab_size,
        "n_convention": "non_vocabulary",
    }


def _repeats(config: RunConfig) -> int:
    """The number of different tokens if a run reads some more than once and its data has a manifest; else 0."""
    from qwen_moe.data.inputs import train_datasets
    from qwen_moe.data.manifest import read_manifest

    manifests = [read_manifest(dataset.prefix) for dataset in train_datasets(config)]
    if not manifests or any(manifest is None for manifest in manifests):
        return 0
    shares = [float(part) for part in config.data.split.split(",")]
    available = int(sum(m.tokens for m in manifests if m is not None) * shares[0] / sum(shares))
    return available if config.training.train_tokens > available else 0


def write_table(found: Collected, output: Path) -> None:
    """Write the table atomically, without the columns that no run has a value for."""
    from launchers.folder.atomic import write_text

    columns = list(dict.fromkeys(key for row in found.rows for key in row if key != "why"))
    kept = [c for c in columns if c in ("loss", "diverged") or any(row.get(c) is not None for row in found.rows)]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=kept, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    write_text(output, table.getvalue())
