"""Checks of a task's documents before a model is asked. The harness says in its log only, or after all work, that a right
answer is none of the choices, and that a prompt may hold its own answer."""

import itertools
import math
from typing import Any

from launchers.counted import counted
from qwen_moe.errors import UserError


def check_choices(name: str, task: Any, limit: float | None = None) -> str:
    """What to tell of documents of ``task`` whose right answer is none of their choices; empty if there are none. ``limit``:
    as in the command. Raises UserError for the first document without choices, or whose answer names no choice at all."""
    config = getattr(task, "config", None)
    own = getattr(config, "process_results", None) is not None or bool(getattr(task, "multiple_input", False))
    if getattr(config, "output_type", None) != "multiple_choice" or own:
        return ""
    documents = task.eval_docs
    most = len(documents) if limit is None else math.ceil(len(documents) * limit) if limit < 1 else int(limit)
    lacking, first, used = 0, "", 0
    for number, document in enumerate(itertools.islice(documents, most), 1):
        used = number
        where = f"document {number:,} of {name}"
        choices, answer = list(task.doc_to_choice(document)), task.doc_to_target(document)
        if not choices:
            raise UserError(f"{where} has no choices: correct it, or leave it out")
        answers = answer if isinstance(answer, list) else [answer]
        # Of several right answers the harness knows numbers only.
        kinds = int if isinstance(answer, list) else (int, str)
        if wrong := [one for one in answers if not isinstance(one, kinds)]:
            raise UserError(
                f"the right answer of {where} is {wrong[0]!r:.60}, expected the number of a choice (0 to "
                f"{len(choices) - 1}) or, if there is one right answer, its text: correct doc_to_target, or the document"
            )
        if not any(0 <= one < len(choices) if isinstance(one, int) else one in choices for one in answers):
            lacking += 1
            first = first or f"document {number:,}: {answer!r:.60} of {counted(len(choices), 'choice')}"
    if not lacking:
        return ""
    return (
        f"in {lacking:,} of {counted(used, 'document')} of {name} the right answer is none of the choices ({first}), "
        "so that they count as wrong: an answer is the number of a choice, from 0, or its text"
    )


def check_examples(name: str, task: Any) -> str:
    """What to tell of a task whose prompts may hold the asked document with its answer, as an example; empty if there is
    nothing. Raises UserError if there are too few documents for the examples."""
    config, given = getattr(task, "config", None), getattr(task, "fewshot_cfg", None)
    wanted = getattr(config, "num_fewshot", None) or 0
    if config is None or given is None or not wanted or given.samples is not None:
        return ""
    source = given.split or config.training_split or config.validation_split or config.test_split
    same = source is not None and source == (config.test_split or config.validation_split)
    left_out = given.split == config.test_split  # the harness leaves the asked document out only then
    if given.sampler == "default" and not given.fewshot_indices:
        there = len(list(task.fewshot_docs()))
        if there < wanted + left_out:
            raise UserError(
                f"{name}: {counted(wanted, 'example')} in each prompt cannot be drawn from {counted(there, 'document')}: "
                "give a smaller --num-fewshot, or more documents"
            )
    if not same or left_out:
        return ""
    fix = f"set fewshot_split: {source}" if config.test_split else "leave fewshot_split out"
    return (
        f"the examples of {name} come from the documents that are asked, so a prompt may hold its own answer: {fix}, with "
        "which the harness leaves the asked document out"
    )
