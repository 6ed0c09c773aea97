"""RULER's question answering over documents (github.com/NVIDIA/RULER, scripts/data/synthetic/qa.py): SQuAD and HotpotQA."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from qwen_moe.documents import read_text
from qwen_moe.errors import UserError
from qwen_moe.evaluation.scoring import any_found
from qwen_moe.evaluation.tasks.task import Draft, Question, Task

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query} Answer:"
)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Asked:
    """A question. ``needed``: documents with the answer; ``related``: others that are preferred as distractors."""

    query: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    related: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collection:
    """Questions and every document, without repetitions."""

    questions: tuple[Asked, ...]
    documents: tuple[str, ...]


def _squad(values: Any) -> list[Asked]:
    found = []
    for article in values["data"]:
        contexts = list(dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            here = paragraph["context"]
            related = tuple(context for context in contexts if context != here)
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    found.append(Asked(asked["question"], answers, (here,), related))
    return found


def _hotpot(values: Any) -> list[Asked]:
    found = []
    for asked in values:
        needed = tuple(dict.fromkeys(f"{title}\n{''.join(parts)}" for title, parts in asked["context"]))
        found.append(Asked(asked["question"], (asked["answer"],), needed))
    return found


def _read(path: Path, option: str, example: str, parse: Callable[[Any], list[Asked]]) -> Collection:
    text = read_text(path, option, example)
    try:
        questions = parse(json.loads(text))
        texts = [part for asked in questions for part in (asked.query, *asked.answers, *asked.needed, *asked.related)]
        if not questions or not all(isinstance(part, str) for part in texts) or not all(a.answers for a in questions):
            raise ValueError("a question has no text or no answer")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{option} {path} does not hold questions of that data set ({error!r}): give {example}"
        ) from None
    documents = {document for asked in questions for document in (*asked.needed, *asked.related)}
    return Collection(tuple(questions), tuple(sorted(documents)))


def read_squad(path: Path) -> Collection:
    """Raises UserError."""
    return _read(path, "--squad", "SQuAD's dev-v2.0.json", _squad)


def read_hotpot(path: Path) -> Collection:
    """Raises UserError."""
    return _read(path, "--hotpot", "HotpotQA's hotpot_dev_distractor_v1.json", _hotpot)


def _draft(collection: Collection, question: Question) -> Draft:
    asked = collection.questions[question.sample]
    needed = len(asked.needed)
    related = question.rng.sample(asked.related, len(asked.related))
    own = {*asked.needed, *related}
    rest = [document for document in collection.documents if document not in own]
    question.rng.shuffle(rest)
    ordered = [*asked.needed, *related, *rest]
    order_seed = question.rng.getrandbits(64)

    def text(count: int) -> str:
        # From the beginning again where the collection ends.
        listed = (ordered * -(-count // len(ordered)))[:count]
        Random(order_seed).shuffle(listed)
        context = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(listed, start=1))
        return TEMPLATE.format(context=context, query=asked.query)

    return Draft(text=text, answers=asked.answers, least=needed)


def documents_task(name: str, collection: Collection) -> Task:
    return Task(
        name=name,
        new_tokens=NEW_TOKENS,
        unit="a document",
        score=any_found,
        draft=lambda question: _draft(collection, question),
    )
