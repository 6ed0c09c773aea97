"""Figures of rollouts: of all together, and the variance of each query's rewards, by which training orders queries."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.counted import counted
from qwen_moe.errors import UserError
from qwen_moe.generation.prompts import FORMS
from qwen_moe.rollout.queries import Query
from qwen_moe.rollout.store import VARIANCES, Row, check_hashes, read_manifest


def mean_and_variance(rewards: Sequence[float]) -> tuple[float, float]:
    """The mean, and the variance over n - 1 (as in group advantages, arXiv 2402.03300). The variance of equal rewards, and
    of one, is exactly 0."""
    mean = math.fsum(rewards) / len(rewards)
    if min(rewards) == max(rewards):
        return rewards[0], 0.0
    return mean, math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)


def figures(rows: Iterable[Row]) -> tuple[dict[str, Any], list[Row]]:
    """The summary of scored rows, and a line for each query: ``number``, ``id``, ``mean``, ``variance``, ``samples``
    and ``asked``."""
    variances: list[Row] = []
    rewards: list[float] = []
    tokens = truncated = 0
    parts: dict[str, list[float]] = {}
    failed: Counter[str] = Counter()
    for row in rows:
        own = [float(sample["reward"]) for sample in row["samples"]]
        mean, variance = mean_and_variance(own)
        line = {"number": row["number"], "id": row["id"], "mean": mean, "variance": variance, "samples": len(own)}
        variances.append(line | {"asked": asked(row["values"])})
        rewards += own
        for sample in row["samples"]:
            tokens += len(sample["tokens"])
            truncated += sample["finish_reason"] == "length"
            failed.update(sample["failed"])
            for name, value in sample["parts"].items():
                parts.setdefault(name, []).append(value)
    flat = sum(line["variance"] == 0 for line in variances)
    summary = {
        "queries": len(variances),
        "samples": len(rewards),
        "mean_reward": math.fsum(rewards) / len(rewards),
        "mean_rewards": {name: math.fsum(values) / len(values) for name, values in parts.items()},
        "variance_within_groups": math.fsum(line["variance"] for line in variances) / len(variances),
        "groups_without_variance": flat / len(variances),
        "mean_length": tokens / len(rewards),
        "truncated": truncated / len(rewards),
        "failed": dict(sorted(failed.items())),
    }
    return summary, variances


def asked(values: Mapping[str, Any]) -> str:
    """A hash of the prompt of a query's line: ids are often no more than its number in some file."""
    prompt = [values.get(name) for name in FORMS]
    if values.get("tools"):
        prompt.append(values["tools"])
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


def described(summary: dict[str, Any]) -> str:
    """The summary in one or two lines."""
    text = (
        f"{counted(summary['queries'], 'query')}, {counted(summary['samples'], 'answer')}: mean reward "
        f"{summary['mean_reward']:.4f}, "
        f"variance within groups {summary['variance_within_groups']:.4f}, "
        f"{summary['groups_without_variance']:.1%} of groups without variance, mean length "
        f"{summary['mean_length']:.1f} tokens, {summary['truncated']:.1%} truncated"
    )
    if len(summary["mean_rewards"]) > 1:
        text += "\nmean of each reward: " + ", ".join(f"{n} {v:.4f}" for n, v in summary["mean_rewards"].items())
    if summary["failed"]:
        text += "\nfailed, and counted as zero: " + ", ".join(
            f"{n} {counted(v, 'time')}" for n, v in summary["failed"].items()
        )
    return text


def read_variances(folder: Path) -> dict[str, Row]:
    """The line of each query (`figures`), by its id. Raises UserError if the rollouts are not finished."""
    manifest = read_manifest(folder)
    if "files" not in manifest:
        raise UserError(f"{folder} is not finished: run the same `qwen-moe rollout` again, which goes on")
    check_hashes(folder, {"files": {VARIANCES: manifest["files"].get(VARIANCES)}})
    rows = map(json.loads, (folder / VARIANCES).read_text(encoding="utf-8").splitlines())
    return {str(row["id"]): row for row in rows}


def by_variance(queries: Sequence[Query], folder: Path) -> list[Query]:
    """``queries`` with those of higher variance first; equal ones keep their order. Raises UserError for queries that the
    rollouts do not have."""
    variances = read_variances(folder)
    missing = [query.id for query in queries if query.id not in variances]
    # Rollouts that are older than the hash do not have it.
    other = [
        q.id for q in queries if q.id in variances and variances[q.id].get("asked", asked(q.values)) != asked(q.values)
    ]
    for ids, what in ((missing, "are not in the rollouts"), (other, "have another prompt than in the rollouts")):
        if ids:
            raise UserError(
                f"{len(ids):,} of {counted(len(queries), 'query')} {what} {folder} (id {ids[0]!r} is the first): give "
                "rollouts of "
                "the same queries"
            )
    return sorted(queries, key=lambda query: -float(variances[query.id]["variance"]))
