"""Encodes documents into token ids in several processes, and keeps their order."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from launchers.counted import counted
from launchers.local.signals import interrupts_kept_from_children
from parallel.threads import available_cpus
from qwen_moe.data.tokenizer import END_OF_TEXT, control_ids, end_of_document_id, load_tokenizer
from qwen_moe.data.unknown import FIX, Unknown
from qwen_moe.errors import UserError

_BATCH_CHARACTERS = 400_000
R = TypeVar("R")

_tokenizer: Any = None
_directory = ""
_end_of_document = 0
_control: dict[int, str] = {}
_unknown: Unknown | None = None
_not_started: UserError | None = None


def check_workers(workers: int) -> int:
    """Number of processes to use; 0 means one for each core that this process may use. Raises UserError if invalid."""
    cores, _ = available_cpus()
    most = max(64, 4 * cores)
    if not 0 <= workers <= most:
        raise UserError(
            f"--workers {workers}: expected 0 (one for each of the {counted(cores, 'core')} here) to {most}"
        )
    return workers or cores


def _start_worker(directory: str) -> None:
    global _tokenizer, _directory, _end_of_document, _control, _unknown
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _directory = directory
    _tokenizer = load_tokenizer(Path(directory))
    _end_of_document = end_of_document_id(_tokenizer, Path(directory))
    _unknown = Unknown(_tokenizer)
    # Its place is taken by text that it has no tokens for, which `Unknown` finds.
    # The end of a document is one even if it is an ordinary word of the tokenizer's model, and no added token.
    control = control_ids(_tokenizer) | {_end_of_document: END_OF_TEXT}
    _control = {n: token for n, token in control.items() if (n, token) != _unknown.token}


def _start_process(start: Callable[[Any], None], given: Any) -> None:
    """Initialize a worker process. It ignores Ctrl-C, which the parent handles, and ends when the parent ends."""
    global _not_started
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        start(given)
    except UserError as error:  # if it left this function, the pool would print a traceback and report a dead process
        _not_started = error


def _if_started(fn: Callable[[Any], R], batch: Any) -> R:
    if _not_started is not None:
        raise _not_started
    return fn(batch)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode(texts: list[str]) -> list[list[int]]:
    # Unlike encode_batch it keeps no offsets, which take half of the time.
    encodings = _tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert _unknown is not None
    found = []
    for text, encoding in zip(texts, encodings, strict=True):
        ids = encoding.ids
        if not _control.keys().isdisjoint(ids):
            # The tokenizer's model has the control token as an ordinary word, so no setting can tell text from it.
            number = next(number for number in ids if number in _control)
            raise UserError(
                f"tokenizer {_directory} turns text into the control token {_control[number]!r} ({number}), because the "
                "text spells it: use a byte-level BPE tokenizer, or remove that text from the corpus"
            )
        if problem := _unknown.problem(text, ids):
            raise UserError(f"tokenizer {_directory} {problem}: {FIX}, or leave such text out of the corpus")
        found.append([*ids, _end_of_document])
    return found


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(directory: Path, documents: Iterator[str], workers: int) -> Iterator[list[list[int]]]:
    """Token ids of every document in order, each ended by <|endoftext|>. Reads at most a few batches per worker ahead.

    Raises UserError if a worker dies.
    """
    return in_order(_encode, _batches(documents), workers, _start_worker, str(directory))


def in_order(
    fn: Callable[[Any], R], batches: Iterator[Any], workers: int, start: Callable[[Any], None], given: Any
) -> Iterator[R]:
    """``fn`` of every batch, in order, from processes that each begin with ``start(given)``; one worker is this process.
    Reads at most a few batches per worker ahead. Raises UserError if a worker dies, and what ``start`` raises."""
    if workers == 1:
        start(given)
        yield from map(fn, batches)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(start, given))

    def submit(batch: Any) -> Future[R]:
        with interrupts_kept_from_children():  # the pool starts its processes as they are needed
            return pool.submit(_if_started, fn, batch)

    try:
        pending = [submit(batch) for batch in itertools.islice(batches, 3 * workers)]
        while pending:
            done = pending.pop(0).result()
            pending.extend(submit(batch) for batch in itertools.islice(batches, 1))
            yield done
    except BrokenProcessPool:
        raise UserError(
            f"one of {counted(workers, 'tokenizing process')} died, most likely because memory ran out: use fewer "
            "--workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
