"""Right answers of multiple-choice tasks, checked before a model is asked: the harness counts a document whose right answer
is none of its choices as wrong, and says so only in its log."""

import itertools
import math
from typing import Any

from launchers.counted import counted
from qwen_moe.errors import UserError


def check_choices(name: str, task: Any, limit: float | None = None) -> str:
    """What to tell of documents of ``task`` whose right answer is none of their choices; empty if there are none. ``limit``:
    as in the command. Raises UserError for the first document without choices, or whose answer names no choice at all."""
    config = getattr(task, "config", None)
    own = getattr(config, "process_results", None) is not None or getattr(task, "multiple_input", 0)
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
        kinds = (
            int if isinstance(answer, list) else (int, str)
        )  # of several right answers, the harness knows numbers only
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
