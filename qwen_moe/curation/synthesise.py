"""Synthetic text: a model answers prompts that are made from templates, and rewards decide what is kept."""

import itertools
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.folder.atomic import write_text
from qwen_moe.curation.recipe import SynthesiseSection
from qwen_moe.errors import UserError

QUERIES, ROLLOUTS, TEXTS, REJECTED = "queries.jsonl", "rollouts", "texts.jsonl", "rejected.jsonl"


def fields_of(template: str) -> set[str]:
    """The names in braces. Raises UserError for a template that `str.format` cannot read."""
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(
            f"synthesise: template {template!r:.80}: {error}; a brace of the text is written twice"
        ) from None
    if wrong := [name for name in found if not name.isidentifier()]:
        raise UserError(f"synthesise: template {template!r:.80} has the field {wrong[0]!r}: give it a name in letters")
    return found


def check(section: SynthesiseSection) -> None:
    """Raise UserError for fields without values, values without a field, and a text that is made of something else."""
    used: set[str] = set()
    for template in (*section.templates, *section.row.values()):
        used |= fields_of(template)
    if missing := sorted(used - set(section.fields)):
        raise UserError(f"synthesise: no values for the field {missing[0]}: give them under fields")
    if idle := sorted(set(section.fields) - used):
        raise UserError(f"synthesise: no template has the field {idle[0]}: leave it out, or use {{{idle[0]}}}")
    if wrong := sorted(fields_of(section.text) - {"prompt", "completion"}):
        raise UserError(f"synthesise: text has the field {wrong[0]}: it is made of {{prompt}} and {{completion}}")


def queries(section: SynthesiseSection) -> list[dict[str, Any]]:
    """The prompts: every template with every combination of the values of its fields, or ``prompts`` of these by seed."""
    found: list[dict[str, Any]] = []
    for number, template in enumerate(section.templates):
        rows = (template, *section.row.values())
        names = sorted(set().union(*map(fields_of, rows)))
        for values in itertools.product(*(section.fields[name] for name in names)):
            chosen = dict(zip(names, values))
            row = {key: value.format(**chosen) for key, value in section.row.items()}
            found.append(row | {"prompt": template.format(**chosen), "template": number, "fields": chosen})
    if section.prompts and section.prompts < len(found):
        keep = sorted(random.Random(section.seed).sample(range(len(found)), section.prompts))
        found = [found[index] for index in keep]
    return [{"id": f"synthetic-{number}", **row} for number, row in enumerate(found)]


def arguments(section: SynthesiseSection, folder: Path) -> list[str]:
    """Of `qwen-moe rollout`, which samples and rewards, and goes on where it was stopped."""
    found = ["rollout", "--checkpoint", str(section.checkpoint), "--input", str(folder / QUERIES)]
    found += ["--output", str(folder / ROLLOUTS), "--reward", *section.rewards, "--on-reward-failure", "zero"]
    if section.reward_weights:
        found += ["--reward-weights", *map(str, section.reward_weights)]
    found += ["--samples", str(section.samples), "--max-new-tokens", str(section.max_new_tokens)]
    found += ["--temperature", str(section.temperature), "--batch-size", str(section.batch_size)]
    return [*found, "--seed", str(section.seed), *(["--chat"] if section.chat else []), "--json"]


def write_queries(section: SynthesiseSection, folder: Path) -> None:
    write_text(folder / QUERIES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in queries(section)))


def select(section: SynthesiseSection, folder: Path) -> dict[str, Any]:
    """Write the answers that pass as documents, and the others with what they lack. Returns the counts."""
    kept: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for row in _rows(folder / ROLLOUTS):
        prompts = row["values"]
        for number, sample in enumerate(row["samples"]):
            text = section.text.format(prompt=prompts["prompt"], completion=sample["text"])
            reason = _reason(sample, section.passing, text)
            document = {
                "text": text,
                "id": f"{row['id']}/{number}",
                "metadata": {
                    "domain": section.domain,
                    "template": prompts["template"],
                    "fields": prompts["fields"],
                    "reward": sample["reward"],
                    **({"filter": "synthesise", "filter_reason": reason} if reason else {}),
                },
            }
            (rejected if reason else kept).append(document)
    for name, documents in ((TEXTS, kept), (REJECTED, rejected)):
        write_text(folder / name, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents))
    if not kept:
        raise UserError(
            f"synthesise: none of {counted(len(rejected), 'answer')} has a reward of {section.passing:g}: lower "
            "passing, or give "
            f"other templates or another checkpoint ({folder / REJECTED} has them)"
        )
    return {"kept": len(kept), "rejected": len(rejected)}


def _reason(sample: dict[str, Any], passing: float, text: str) -> str:
    """Why an answer is not kept; empty if it is."""
    if sample["failed"]:
        return "failed_reward"
    if sample["finish_reason"] != "stop":
        return "truncated"
    if sample["reward"] < passing:
        return "low_reward"
    return "" if text.strip() else "empty"


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("rollouts-*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            yield json.loads(line)
