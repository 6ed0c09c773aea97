"""Figures of the steps of one `qwen-moe post-train`: of training runs, and of a model's answers to held-out queries."""

import math
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.folder.run_folder import METRICS
from qwen_moe.config import RunConfig
from qwen_moe.data.inputs import train_datasets
from qwen_moe.data.manifest import read_manifest
from qwen_moe.rollout.store import Row, read_rollouts
from qwen_moe.runs.outcome import read_outcome
from qwen_moe.runs.records import ATTEMPTS, read_lines
from qwen_moe.runs.report import steps_without_learning

_LAST, _LEAST = 10, 5  # a tenth of the steps, at least five of them


def of_run(config: RunConfig) -> dict[str, Any]:
    """Figures of a finished training run: its data, its steps, first and last values of what it measured of itself."""
    records = [record for record in read_lines(config.run_dir / METRICS) if "loss" in record]
    found: dict[str, Any] = {
        "learned_from": _learned_from(config),
        "steps": len(records),
        "unit": config.objective.unit,
        "attempts": len((config.run_dir / ATTEMPTS).read_text(encoding="utf-8").splitlines()),
    }
    if silent := steps_without_learning(records):
        found["learned_from"] += (
            f"; nothing in {silent:,} of {counted(len(records), 'step')}, where all answers to each query had the same "
            "reward"
        )
    last = records[-_last_steps(len(records)) :]
    for name in ("loss", "accuracy", "reward"):
        if name in records[0]:
            found[name] = [float(records[0][name]), math.fsum(float(one[name]) for one in last) / len(last)]
    outcome = read_outcome(config, config.run_dir)
    return found | ({"warning": outcome.why} if outcome.state != "complete" else {})


def _last_steps(steps: int) -> int:
    """How many of a run's last steps its last loss is the mean of: one step, perhaps of few examples, says little."""
    return max(1, min(steps // 2, max(_LEAST, steps // _LAST)))


def rewards_by_step(run_dir: Path) -> tuple[list[int], list[float]]:
    """The mean reward of the samples that each step of a run learned from."""
    records = [record for record in read_lines(run_dir / METRICS) if "reward" in record and "loss" in record]
    return [int(record["step"]) for record in records], [float(record["reward"]) for record in records]


def _learned_from(config: RunConfig) -> str:
    rollout = config.rollout
    if rollout is not None:
        return (
            f"{counted(rollout.episodes, 'episode')} of {counted(rollout.queries_per_episode, 'query')} with "
            f"{counted(rollout.samples, 'sampled answer')} each"
        )
    counts: dict[str, int] = {}
    for dataset in train_datasets(config):
        manifest = read_manifest(dataset.prefix)
        for name in ("conversations", "pairs"):
            if manifest is not None and manifest.counts.get(name):
                counts[name] = counts.get(name, 0) + manifest.counts[name]
    text = " and ".join(counted(count, name.removesuffix("s")) for name, count in counts.items()) or "its data"
    epochs = config.training.epochs
    return text + (f", {counted(epochs, 'epoch')}" if epochs else "")


def of_answers(folder: Path, shown: int) -> dict[str, Any]:
    """The score of a model's greedy answers, which are kept in ``folder``, its standard error, and the first answers."""
    _, rows = read_rollouts(folder)
    rewards: list[float] = []
    samples: list[dict[str, Any]] = []
    for row in rows:
        (answer,) = row["samples"]
        rewards.append(float(answer["reward"]))
        if len(samples) < shown:
            samples.append({"query": _asked(row), "expected": row["values"].get("answer"), "answer": answer["text"],
                            "reward": rewards[-1]})  # fmt: skip
    mean, error = mean_and_error(rewards)
    return {"score": mean, "error": error, "queries": len(rewards), "samples": samples}


def gain(before: Path, after: Path) -> dict[str, float]:
    """The mean difference of the rewards of the same queries, and its standard error."""
    pairs = zip(*(list(_rewards(folder)) for folder in (before, after)), strict=True)
    mean, error = mean_and_error([second - first for first, second in pairs])
    return {"gain": mean, "gain_error": error}


def _rewards(folder: Path) -> list[float]:
    return [float(row["samples"][0]["reward"]) for row in read_rollouts(folder)[1]]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, 0 for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _asked(row: Row) -> str:
    """What the user asked: the prompt's text, or the last message."""
    values = row["values"]
    if isinstance(values.get("prompt"), str):
        return str(values["prompt"])
    messages = values.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", ""))
    return f"query {row['id']}"
