"""Turns conversations, or pairs of answers, into token files for training; the output appears complete or not at all.

Beside `PREFIX.bin` and `PREFIX.idx`, whose documents are conversations, `PREFIX.learn.bin` says of each token whether it is
learned, and `PREFIX.preferences.bin` of each pair which answer is better, by criterion.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launchers.counted import counted
from qwen_moe.alone import alone
from qwen_moe.data.chat import Chat
from qwen_moe.data.chat_rows import TOO_LONG, Outcome, Rules, checked, encoded_rows
from qwen_moe.data.checked import carried
from qwen_moe.data.content import sample_sha256
from qwen_moe.data.conversations import Kind
from qwen_moe.data.corpus import BadLine, ReadCounts
from qwen_moe.data.encode import check_workers
from qwen_moe.data.manifest import (
    LEARN,
    PREFERENCES,
    PreparedData,
    bin_path,
    check_prefix_name,
    column_path,
    idx_path,
    partial_path,
)
from qwen_moe.data.output import (
    Digested,
    Watch,
    no_partial_left,
    put_in_place,
    settled,
    synced,
)
from qwen_moe.data.packed import check_unpackers
from qwen_moe.data.sources import Corpus, Tally, find_corpus
from qwen_moe.data.tokenizer import load_tokenizer, tokenizer_hash, tokenizer_identity
from qwen_moe.errors import UserError
from qwen_moe.progress import style

# Fewer bytes than these are tokenized, and checked, sooner than other processes have started.
_SMALL, _SMALL_TO_CHECK = 4_000_000, 200_000_000


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Digested):
    """What decides the tokens of an output, in addition to the content of its inputs."""

    inputs: tuple[str, ...]
    rules: Rules
    template_sha256: str
    on_bad_line: BadLine = "error"

    @property
    def tokenizer(self) -> Path:
        return self.rules.tokenizer

    def _digest(self, lines: list[bytes]) -> str:
        rules = self.rules
        digest = hashlib.sha256(b"".join(lines))
        digest.update(tokenizer_hash(rules.tokenizer).encode())
        settings = (rules.learn, rules.length, rules.too_long if rules.length else "", self.on_bad_line)
        digest.update(repr(("chat", self.template_sha256, *settings)).encode())
        return digest.hexdigest()


def template_sha256(chat: Chat) -> str:
    """A hash of what decides the text of a conversation: the template and the special tokens that it may name."""
    parts = [chat.template, {name: str(token) for name, token in chat.tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def chat_request(inputs: tuple[str, ...], rules: Rules, on_bad_line: BadLine = "error") -> ChatRequest:
    """A request. Raises UserError if the tokenizer or its template cannot be used."""
    load_tokenizer(rules.tokenizer)
    if rules.too_long != "error" and not rules.length:
        raise UserError(f"--too-long {rules.too_long} needs --length: give the most tokens of a conversation")
    hashed = template_sha256(Chat(rules.tokenizer, rules.learn))
    return ChatRequest(inputs=inputs, rules=rules, template_sha256=hashed, on_bad_line=on_bad_line)


def prepare_chat(
    request: ChatRequest, prefix: Path, *, workers: int = 0, overwrite: bool = False
) -> tuple[PreparedData, bool]:
    """Tokenize ``request``'s rows into ``prefix``.bin, .idx and .learn.bin. Returns (the manifest, whether anything was
    done).

    All rows are checked before any is tokenized, and all are of one kind (`conversations.Kind`). The output does not depend
    on ``workers`` (0: one per core). Running it again does nothing; an output of another request raises OtherDataThere
    unless ``overwrite``. Files appear under their names only when they are complete.
    """
    check_prefix_name(prefix)
    given, workers = workers, check_workers(workers)
    corpus = find_rows(request.inputs)
    if (existing := settled(request, corpus, prefix, overwrite)) is not None:
        return existing, False
    check_unpackers(source.path for source in corpus.sources)
    if not given and corpus.bytes < _SMALL:
        workers = 1
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with alone(prefix), no_partial_left(prefix, (LEARN, PREFERENCES)):
        # Another process may have prepared it in the meantime.
        if (existing := settled(request, corpus, prefix, overwrite)) is not None:
            return existing, False
        print(f"reading {corpus}", file=sys.stderr)
        watch, by_status = Watch(corpus.sources), request.by_status(corpus.sources)
        kind = _check(request, corpus, workers if corpus.bytes > _SMALL_TO_CHECK else 1)
        prepared = replace(_write(request, corpus, prefix, kind, workers), request=by_status)
        watch.check()
        put_in_place(prefix, prepared, None)
        return prepared, True


def find_rows(inputs: tuple[str, ...]) -> Corpus:
    """The JSONL files behind ``inputs``. Other files of a folder are left out and counted. Raises UserError."""
    corpus = find_corpus(inputs)
    other = [source for source in corpus.sources if not source.has_lines]
    if named := next((source for source in other if str(source.path) in inputs or source.kind == "python"), None):
        raise UserError(f"{named.path} is not JSONL: chat data have one JSON object per line, in .jsonl or .ndjson")
    corpus.sources = [source for source in corpus.sources if source.has_lines]
    for source in other:
        corpus.left_out.add("not JSONL", str(source.path))
    if not corpus.sources:
        raise UserError(f"{', '.join(inputs)} contain no .jsonl or .ndjson file; left out: {corpus.left_out}")
    return corpus


@dataclass
class _Mistakes:
    """Lines that cannot be used. ``skip``: they are left out, except rows that are too long."""

    skip: bool
    rows: int = 0
    tally: Tally = field(default_factory=Tally)
    first: str = ""

    def used(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Those that can be used or were left out on purpose."""
        for outcome in outcomes:
            self.rows += 1
            if not outcome.problem:
                yield outcome
                continue
            if self.skip and outcome.reason != TOO_LONG:
                yield replace(outcome, problem="")
            else:
                self.tally.add(outcome.reason, outcome.where)
                self.first = self.first or f"{outcome.where}: {outcome.problem}"

    def check(self) -> None:
        """Raises UserError if there are any."""
        if count := sum(self.tally.counts.values()):
            skip = "" if self.skip or set(self.tally.counts) == {TOO_LONG} else ", or use --on-bad-line skip"
            raise UserError(
                f"{count:,} of {counted(self.rows, 'row')} cannot be used: {self.tally}. {self.first}. Correct these "
                f"rows{skip}"
            )


def _check(request: ChatRequest, corpus: Corpus, workers: int) -> Kind:
    """The kind of the rows. Raises UserError, which counts all mistakes that are seen without tokenizing."""
    mistakes = _Mistakes(skip=request.on_bad_line == "skip")
    kind: Kind | None = None
    for outcome in mistakes.used(_of_one_kind(checked(request.rules, corpus, workers))):
        kind = kind or outcome.kind
    mistakes.check()
    if kind is None:
        raise UserError(f"{', '.join(request.inputs)}: no row can be used; give other --input")
    if kind == "pairs" and request.rules.learn == "all":
        raise UserError("--learn all is not for pairs: both answers have the same prompt; use assistant or last")
    if kind == "pairs" and request.rules.too_long == "cut":
        raise UserError("--too-long cut is not for pairs: a cut answer is not the one that was judged; use drop")
    return kind


def _of_one_kind(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Rows of another kind than the first good one are mistakes."""
    names = {"pairs": "a pair", "chat": "a conversation"}
    kind: Kind | None = None
    for outcome in outcomes:
        kind = kind or outcome.kind
        if kind is None or outcome.kind in (None, kind):
            yield outcome
        else:
            what = f"expected {names[kind]} as before, found {names[str(outcome.kind)]}; give it another --output"
            yield Outcome(where=outcome.where, reason="of another kind", problem=what)


class Writer:
    """The documents and columns of an output under temporary names, and their figures."""

    def __init__(self, prefix: Path, kind: Kind, vocabulary: int) -> None:
        from qwen_moe.data.megatron import DType, IndexedDatasetBuilder

        self.bin, self.idx = partial_path(bin_path(prefix)), partial_path(idx_path(prefix))
        self.column = partial_path(column_path(prefix, LEARN))
        self.examples = "pairs" if kind == "pairs" else "conversations"
        self.counts = dict.fromkeys(
            (self.examples, "learned_tokens", "longest", "truncated", "cut_tokens", "cut_learned_tokens"), 0
        )
        self.documents = self.tokens = 0
        self.largest = -1
        self._builder = IndexedDatasetBuilder(str(self.bin), dtype=DType.optimal_dtype(vocabulary))
        self._learn = self.column.open("wb")
        self.columns = {LEARN: self.column}
        self.criteria: dict[str, int] = {}  # by how many pairs each was judged
        self._prefix, self._judged = prefix, list[dict[str, int]]()
        self._known: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}

    def add(self, outcome: Outcome) -> None:
        import torch

        counts = self.counts
        for document in outcome.documents:
            self._builder.add_item(torch.from_numpy(document.ids))
            self._builder.end_document()
            self._learn.write(document.learn.tobytes())
            self.documents += 1
            self.tokens += len(document.ids)
            self.largest = max(self.largest, int(document.ids.max()))
            counts["learned_tokens"] += document.learned
        counts[self.examples] += 1
        if self.examples == "pairs":
            # Many pairs are judged alike: each way is held once.
            self._judged.append(self._known.setdefault(tuple(outcome.judged.items()), outcome.judged))
            for name in outcome.judged:
                self.criteria[name] = self.criteria.get(name, 0) + 1
        counts["longest"] = max(counts["longest"], sum(len(document.ids) for document in outcome.documents))
        counts["truncated"] += outcome.cut > 0
        counts["cut_tokens"] += outcome.cut
        counts["cut_learned_tokens"] += outcome.cut_learned

    def close(self) -> None:
        """Finish the files. An output without documents has none."""
        self._learn.close()
        if self._judged:
            self._write_preferences()
        if self.documents:
            self._builder.finalize(str(self.idx))
        else:
            self._builder.data_file.close()

    def _write_preferences(self) -> None:
        import numpy as np

        self.criteria = dict(sorted(self.criteria.items()))
        rows = {id(judged): [judged.get(name, 0) for name in self.criteria] for judged in self._known.values()}
        self.columns[PREFERENCES] = partial_path(column_path(self._prefix, PREFERENCES))
        values = np.array([rows[id(judged)] for judged in self._judged], np.int8)
        self.columns[PREFERENCES].write_bytes(values.tobytes())


def _write(request: ChatRequest, corpus: Corpus, prefix: Path, kind: Kind, workers: int) -> PreparedData:
    """Write everything under temporary names."""
    rules = request.rules
    chat, plain = Chat(rules.tokenizer, rules.learn), load_tokenizer(rules.tokenizer)
    vocabulary = max(chat.tokenizer.get_vocab().values()) + 1
    counts, left_out = ReadCounts(), Tally()
    mistakes = _Mistakes(skip=request.on_bad_line == "skip")
    writer = Writer(prefix, kind, vocabulary)
    with contextlib.closing(writer), _bar(corpus) as bar:
        for outcome in mistakes.used(_of_one_kind(encoded_rows(rules, corpus, counts, workers))):
            if outcome.reason:
                left_out.add(outcome.reason, outcome.where)
            elif not mistakes.first:
                writer.add(outcome)
            bar.update(counts.bytes - bar.n)
    mistakes.check()
    if left_out.counts:
        print(f"rows left out: {left_out}", file=sys.stderr)
    if not writer.documents:
        raise UserError(f"{', '.join(request.inputs)}: no row is left; give other --input or a larger --length")
    return PreparedData(
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=counts.bytes,
        max_token_id=writer.largest,
        end_of_document_id=chat.end,
        vocab_size=vocabulary,
        tokenizer=str(rules.tokenizer),
        tokenizer_sha256=tokenizer_hash(rules.tokenizer),
        tokenizer_identity=tokenizer_identity(plain),
        skipped=sum(left_out.counts.values()),
        bin_bytes=writer.bin.stat().st_size,
        bin_sha256=synced(writer.bin),
        bin_sample_sha256=sample_sha256(writer.bin),
        bin_mtime_ns=writer.bin.stat().st_mtime_ns,
        idx_sha256=synced(writer.idx),
        request="",  # `prepare_chat` adds it
        content=request.by_content(corpus.sources, counts.digests),
        settings=request.settings(),
        files=len(corpus.sources),
        left_out=corpus.left_out.counts | left_out.counts,
        kind=kind,
        columns={name: synced(path) for name, path in writer.columns.items()},
        criteria=writer.criteria,
        counts=writer.counts,
        template_sha256=request.template_sha256,
        decontaminated=carried(corpus.sources, counts.digests),
    )


def _bar(corpus: Corpus) -> "tqdm[Any]":
    return tqdm(total=corpus.bytes, unit="B", unit_scale=True, desc="tokenize", **style())
