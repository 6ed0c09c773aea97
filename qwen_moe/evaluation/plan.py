"""Which prompts an evaluation has, and the checks of all of them before any work."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from qwen_moe.errors import UserError
from qwen_moe.evaluation.model import Completer
from qwen_moe.evaluation.scoring import clean
from qwen_moe.evaluation.tasks.task import Draft, Encode, Question, Task, fit


@dataclass(frozen=True)
class Item:
    """One prompt. ``depth``: as in `Question`."""

    task: str
    length: int
    depth: float | None
    sample: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Prompts of every length for every task, depth and sample. ``asked``: every setting that decides the prompts and how
    the model answers, as results.json names them."""

    kind: str
    tasks: dict[str, Task]
    lengths: tuple[int, ...]
    depths: tuple[float | None, ...]
    samples: int
    seed: int
    asked: dict[str, Any]

    def items(self) -> Iterator[Item]:
        """Short prompts come first, and prompts that can be completed together follow each other."""
        for length in self.lengths:
            for task in self.tasks:
                for depth in self.depths:
                    for sample in range(self.samples):
                        yield Item(task, length, depth, sample)

    def draft(self, item: Item, encode: Encode) -> Draft:
        """The same for the same seed and item, whatever else is asked. Every length has the same questions."""
        rng = Random(f"{self.seed} {item.task} {item.depth} {item.sample}")
        question = Question(length=item.length, sample=item.sample, depth=item.depth, rng=rng, encode=encode)
        return self.tasks[item.task].draft(question)

    def prompt(self, item: Item, encode: Encode) -> tuple[list[int], tuple[str, ...]]:
        """Tokens and answers. The prompt and its completion have at most ``item.length`` tokens."""
        draft = self.draft(item, encode)
        _, tokens = fit(draft, encode, item.length - self.tasks[item.task].new_tokens)
        return tokens, draft.answers


def depths(count: int) -> tuple[float, ...]:
    """``count`` equally spaced places from the beginning (0) to the end (1); a single one is the middle."""
    return tuple(round(step / (count - 1), 6) for step in range(count)) if count > 1 else (0.5,)


def check(evaluation: Evaluation, completer: Completer) -> None:
    """Raise UserError if the model does not reach a length, the tokenizer cannot write an answer, or a length is too
    short."""
    longest = max(evaluation.lengths)
    if completer.reach is not None and longest > completer.reach:
        raise UserError(
            f"--lengths {longest} is beyond the model's reach of {completer.reach} tokens: leave it out, or extend the "
            "context (--context-extension)"
        )
    short: dict[tuple[int, str], int] = {}
    for item in evaluation.items():
        draft = evaluation.draft(item, completer.encode)
        _check_answers(item, draft, completer)
        needed = _needed(evaluation, item, draft, completer.encode)
        if needed > item.length:
            place = (item.length, item.task)
            short[place] = max(short.get(place, 0), _enough(evaluation, item, completer.encode))
    if short:
        length = min(length for length, _ in short)
        tasks = ", ".join(f"{task} (at least {least})" for (at, task), least in short.items() if at == length)
        raise UserError(
            f"--lengths {length} is too short, in this tokenizer's tokens, for {tasks}: give greater lengths"
            + (", or leave these tasks out (--tasks)" if len(evaluation.tasks) > 1 else "")
        )


def _check_answers(item: Item, draft: Draft, completer: Completer) -> None:
    """The score looks for the answers' letters in the text of tokens: the tokenizer must be able to write them."""
    score = {answer: clean(completer.decode(completer.encode(f" {answer}"))) for answer in draft.answers}
    for answer, written in score.items():
        if clean(answer).lower() not in written.lower():
            raise UserError(
                f"the tokenizer cannot write {answer!r}, an answer of {item.task}: its tokens read {written!r}. Leave the "
                "task out, or use a tokenizer that gives text back unchanged"
            )


def _needed(evaluation: Evaluation, item: Item, draft: Draft, encode: Encode) -> int:
    return len(encode(draft.text(draft.least))) + evaluation.tasks[item.task].new_tokens


def _enough(evaluation: Evaluation, item: Item, encode: Encode) -> int:
    """The smallest length that holds an item like ``item``. A greater length may ask for more (cwe's words), so try it."""
    length = item.length
    for _ in range(10):
        longer = Item(item.task, length, item.depth, item.sample)
        needed = _needed(evaluation, longer, evaluation.draft(longer, encode), encode)
        if needed <= length:
            break
        length = needed
    return length
