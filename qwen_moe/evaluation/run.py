"""Runs an evaluation: completes the prompts that have no answer yet, and makes the results once all have one."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.duration import span
from launchers.folder.atomic import write_json
from qwen_moe.evaluation.answers import AnswerFile, claim_folder, read_all
from qwen_moe.evaluation.model import Completer
from qwen_moe.evaluation.plan import Evaluation, Item, check
from qwen_moe.evaluation.results import RESULTS, results_of
from qwen_moe.evaluation.scoring import clean
from qwen_moe.progress import style

# The user is told how long the prompts of a length may take, if it is longer than this.
_LONG_SECONDS = 600
# Prompts are completed together up to this many tokens; longer ones are completed one by one.
BATCH_TOKENS = 32768


def run_evaluation(
    evaluation: Evaluation,
    completer: Completer,
    output: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> dict[str, Any] | None:
    """Complete this shard's prompts and return the results, or None while other shards have prompts left.

    ``shard``: (index, count); each of ``count`` processes completes every ``count``-th prompt and appends its answers to a
    file of its own in ``output``. A process that was killed loses the prompts that were running; the same call goes on.
    Whoever ends last writes results.json. Raises UserError, before any work, for what cannot be evaluated.
    """
    check(evaluation, completer)
    claim_folder(output, evaluation.asked | completer.identity)
    index, count = shard
    items = list(evaluation.items())
    with AnswerFile(output, index) as file:
        known = read_all(output)
        # Of what is left, so that another number of shards may go on.
        own = [item for number, item in enumerate(items) if number % count == index and item not in known]
        _complete(evaluation, own, completer, file, progress)
    records = read_all(output)
    if any(item not in records for item in items):
        return None
    results = results_of(evaluation, completer.identity, [records[item] for item in items])
    write_json(output / RESULTS, results)
    return results


def _complete(
    evaluation: Evaluation, items: list[Item], completer: Completer, file: AnswerFile, progress: bool
) -> None:
    from tqdm import tqdm

    before: tuple[int, float] | None = None  # the length of the batch before, and seconds for each of its prompts
    shown = progress and bool(items)
    with tqdm(total=len(items), desc="prompts", unit="prompt", disable=not shown, **style()) as bar:
        for batch in _batches(evaluation, items):
            length, begin = batch[0].length, time.perf_counter()
            bar.set_postfix_str(f"{batch[0].task}, {counted(length, 'token')}")
            if before is not None and before[0] < length and evaluation.asked.get("attention") == "dense":
                left = sum(item.length == length for item in items)
                note = _note_of_time(before, length, left)
                if progress and note:
                    bar.write(note, sys.stderr)
            recorder = _Recorder(evaluation, batch, completer, file, bar.update)
            new_tokens = evaluation.tasks[batch[0].task].new_tokens
            completer.complete([tokens for tokens, _ in recorder.prompts], length, new_tokens, recorder.done)
            assert recorder.count == len(batch), f"{recorder.count} of {len(batch)} prompts were completed"
            before = length, (time.perf_counter() - begin) / len(batch)


def _note_of_time(before: tuple[int, float], length: int, prompts: int) -> str:
    """What the user should know before ``prompts`` of ``length`` tokens are read, from the time of shorter ones: attention
    takes at most the square of the length. Empty if they do not take long."""
    shorter, seconds = before
    each = seconds * (length / shorter) ** 2
    if each * prompts < _LONG_SECONDS:
        return ""
    return (
        f"{counted(prompts, 'prompt')} of {counted(length, 'token')} may take {span(each)} each: one of {shorter:,} "
        f"takes {span(seconds)}, "
        "and attention grows with the square of the length. Each answer is kept. --attention sparse does less work"
    )


class _Recorder:
    """Writes the answers of a batch as they come."""

    def __init__(
        self,
        evaluation: Evaluation,
        batch: list[Item],
        completer: Completer,
        file: AnswerFile,
        update: Callable[[], object],
    ) -> None:
        self.tasks, self.batch, self.completer, self.file, self.update = (
            evaluation.tasks,
            batch,
            completer,
            file,
            update,
        )
        self.prompts = [evaluation.prompt(item, completer.encode) for item in batch]
        self.count = 0
        self.since = time.perf_counter()

    def done(self, index: int, tokens: list[int]) -> None:
        """``seconds`` of a record are those since the record before, so that they add up to the whole time."""
        item, (prompt, answers) = self.batch[index], self.prompts[index]
        completion = clean(self.completer.decode(tokens))
        now = time.perf_counter()
        record = {
            "task": item.task,
            "length": item.length,
            "depth": item.depth,
            "sample": item.sample,
            "tokens": len(prompt),
            "new_tokens": len(tokens),
            "answers": list(answers),
            "completion": completion,
            "score": self.tasks[item.task].score(completion, answers),
            "seconds": round(now - self.since, 3),
            **self.completer.reading(),
        }
        self.file.append(record)
        self.since = now
        self.count += 1
        self.update()


def _batches(evaluation: Evaluation, items: list[Item]) -> Iterator[list[Item]]:
    """Neighbors of one length and one number of new tokens, as many as `BATCH_TOKENS` allow."""
    batch: list[Item] = []
    for item in items:
        alike = batch and (item.length, evaluation.tasks[item.task].new_tokens) == (
            batch[0].length,
            evaluation.tasks[batch[0].task].new_tokens,
        )
        if batch and (not alike or (len(batch) + 1) * item.length > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
