"""Scores the files of a corpus one after another: `score_corpus`."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from launchers.counted import counted
from qwen_moe.alone import alone
from qwen_moe.curation.scores.annotate import Annotator, add_metadata, check_none_failed, forget
from qwen_moe.curation.scores.documents import Document, grouped, read
from qwen_moe.curation.scores.settings import OnFailure
from qwen_moe.curation.scores.store import Growing, Store
from qwen_moe.data.corpus import ReadCounts, Reading
from qwen_moe.data.output import Watch
from qwen_moe.data.parquet import check_columns
from qwen_moe.data.sources import Source, find_corpus
from qwen_moe.errors import UserError
from qwen_moe.progress import style

if TYPE_CHECKING:
    from qwen_moe.generation.session import Session


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is scored, and by what. ``shard``: (this, of how many), from 1. ``block``: documents that are scored together."""

    inputs: tuple[str, ...]
    output: Path
    annotators: Sequence[Annotator]
    reading: Reading
    shard: tuple[int, int] = (1, 1)
    block: int = 256
    on_failure: OnFailure = "error"
    session: "Session | None" = None

    @property
    def reports(self) -> bool:
        return self.session is None or self.session.reports


@dataclass(frozen=True)
class Outcome:
    """The folder, and how many documents were scored now."""

    store: Store
    scored: int


def score_corpus(job: Job) -> Outcome | None:
    """Score the files of this shard. The outcome is that of the rank that reports. All ranks call this. Raises UserError."""
    corpus = find_corpus(job.inputs, parquet=True)
    check_columns(corpus.sources, job.reading.text_key, "--text-key")
    groups = grouped(corpus.sources)
    if job.shard[1] > len(groups) and job.reports:
        print(
            f"{counted(len(groups), 'file is', 'files are')} for {counted(job.shard[1], 'shard')}: some have nothing to do",
            file=sys.stderr,
        )
    mine = list(range(job.shard[0] - 1, len(groups), job.shard[1]))
    store = None
    if job.reports:
        print(corpus, file=sys.stderr)
        job.output.parent.mkdir(parents=True, exist_ok=True)
        with alone(job.output):  # shards that start together write one manifest
            store = Store(job.output, _settings(job, groups), len(groups))
    with _bar(job, sum(source.bytes for index in mine for source in groups[index])) as bar:
        scored = sum(_one_file(job, store, index, groups[index], bar) for index in mine)
    return None if store is None else Outcome(store, scored)


def _settings(job: Job, groups: list[list[Source]]) -> dict[str, Any]:
    sources = [[str(source.path), source.kind, source.bytes] for group in groups for source in group]
    return {
        "input": sources,
        # Whether a mistake stops the command changes no result.
        "reading": {"text_key": job.reading.text_key, "on_bad_utf8": job.reading.on_bad_utf8},
        "block": job.block,
        "annotators": [annotator.identity() for annotator in job.annotators],
    }


@contextlib.contextmanager
def _bar(job: Job, total: int) -> Iterator[Any]:
    settings = style() | {"delay": 1.0, "leave": False, "disable": not job.reports}
    with tqdm(total=total, unit="B", unit_scale=True, desc="scoring", **settings) as bar:
        yield bar


def _one_file(job: Job, store: Store | None, index: int, sources: list[Source], bar: Any) -> int:
    """Score a file, unless it is done. Another process that does the same waits, and then finds it done. Returns how many
    documents were scored."""
    with contextlib.ExitStack() as stack:
        growing = None
        if store is not None:
            stack.enter_context(alone(store.path(index)))
            if store.is_done(index):
                _check_unchanged(store, index, sources)
            else:
                growing = Growing(store, index, job.block)
        watch = Watch(sources)
        done = _agree(job, -1 if growing is None else _still_there(job, growing, sources))
        if done < 0:
            bar.update(sum(source.bytes for source in sources))
            return 0
        counts = ReadCounts()
        told = scored = 0
        documents = itertools.islice(read(sources, counts, job.reading), done, None)
        while block := list(itertools.islice(documents, job.block)):
            _annotate(job, block)
            if growing is not None:
                growing.add(block)
            scored += len(block)
            bar.update(counts.bytes - told)
            told = counts.bytes
        bar.update(counts.bytes - told)
        if growing is not None:
            watch.check()
            facts: dict[str, Any] = {"input": [str(source.path) for source in sources]}
            facts |= {"status": watch.statuses, "content": counts.digests}
            growing.finish(facts | {"left_out": counts.left_out.counts, "where": str(counts.left_out)})
        return scored


def _check_unchanged(store: Store, index: int, sources: list[Source]) -> None:
    """Raise UserError if the input of a finished file has changed since, although its size has not."""
    facts = store.facts(index)
    if facts.get("status") in (None, [source.status() for source in sources]):  # folders of earlier versions have none
        return
    for source, digest in zip(sources, facts.get("content", ()), strict=True):
        if source.sha256() != digest:
            raise UserError(
                f"{source.path} has changed since {store.path(index)} was made of it: give another --output, or remove that "
                "file to score it again"
            )


def _agree(job: Job, done: int) -> int:
    """How many documents are done: what the rank that writes has found."""
    return done if job.session is None else job.session.agree([done])[0]


def _still_there(job: Job, growing: Growing, sources: list[Source]) -> int:
    """How many documents an earlier attempt left. If they are not those of the input, the file is begun anew."""
    documents = itertools.islice(read(sources, ReadCounts(), job.reading), growing.done)
    same = [growing.fits(number, document) for number, document in enumerate(documents)]
    if len(same) < growing.done or not all(same):
        growing.begin_anew()
    return growing.done


def _annotate(job: Job, block: list[Document]) -> None:
    for document in block:
        forget(document)
    for annotator in job.annotators:
        for document, found in zip(block, annotator.annotate(block), strict=True):
            add_metadata(document, found)
    if job.on_failure == "error":
        check_none_failed(block)
