"""Lines of JSONL to encoded conversations, in several processes, in order. A mistake in a line is returned, not raised."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwen_moe.data.chat import Chat, Encoded, Learn
from qwen_moe.data.conversations import BadRow, Conversation, Kind, kind_of, preferences
from qwen_moe.data.corpus import LONGEST_DOCUMENT, ReadCounts, read_lines
from qwen_moe.data.encode import in_order
from qwen_moe.data.sources import Corpus
from qwen_moe.documents import json_object
from qwen_moe.errors import UserError

TooLong = Literal["error", "drop", "cut"]
TOO_LONG = "longer than --length"
NOTHING_LEFT = "nothing left to learn after the cut"
_BATCH_BYTES = 400_000


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows become tokens. ``length``: the most tokens of a conversation, or of both answers of a pair; 0: any number."""

    tokenizer: Path
    learn: Learn = "assistant"
    length: int = 0
    too_long: TooLong = "error"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the line at ``where``: its documents (two of a pair), or the ``reason`` why it has none. ``problem``
    says what is wrong with it; it is empty for a line that is left out by the rule for long ones. ``judged``: of a pair, by
    criterion, which answer is better (`conversations.preferences`). ``cut`` and ``cut_learned`` count tokens that were cut
    off."""

    where: str
    kind: Kind | None = None
    documents: tuple[Encoded, ...] = ()
    judged: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    cut_learned: int = 0
    reason: str = ""
    problem: str = ""


_Lines = list[tuple[str, bytes]]
_rules: Rules | None = None
_chat: Chat | None = None


def _start_worker(rules: Rules) -> None:
    global _rules, _chat
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _rules, _chat = rules, Chat(rules.tokenizer, rules.learn)


def _read(where: str, line: bytes) -> tuple[Kind, tuple[Conversation, ...], dict[str, int]]:
    """The kind and the conversations of a line, and of a pair what was judged. Raises BadRow."""
    assert _chat is not None
    if len(line) > LONGEST_DOCUMENT:
        raise BadRow("not JSON", f"the line has more than {LONGEST_DOCUMENT:,} bytes; JSONL has one object per line")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not Unicode", f"byte {error.start} of the line is not UTF-8; convert the file") from None
    if "\0" in text:
        raise BadRow("not Unicode", "the line has a NUL byte, which no text has; convert the file")
    try:
        row = json_object(text, "the line")
    except UserError as error:
        raise BadRow("not JSON", str(error)) from None
    kind = kind_of(row)
    return kind, _chat.read(row), preferences(row) if kind == "pairs" else {}


def _check(lines: _Lines) -> list[Outcome]:
    """What can be said of lines before they are tokenized."""
    outcomes = []
    for where, line in lines:
        try:
            outcomes.append(Outcome(where=where, kind=_read(where, line)[0]))
        except BadRow as error:
            outcomes.append(Outcome(where=where, reason=error.reason, problem=str(error)))
    return outcomes


def _encode(lines: _Lines) -> list[Outcome]:
    outcomes = []
    for where, line in lines:
        try:
            outcomes.append(_encode_one(where, line))
        except BadRow as error:
            outcomes.append(Outcome(where=where, reason=error.reason, problem=str(error)))
    return outcomes


def _encode_one(where: str, line: bytes) -> Outcome:
    assert _chat is not None and _rules is not None
    kind, read, judged = _read(where, line)
    documents = tuple(_chat.encode(conversation) for conversation in read)
    if kind == "pairs" and documents[0].ids.tolist() == documents[1].ids.tolist():
        raise BadRow("chosen equal to rejected", "chosen and rejected are the same tokens: nothing can be preferred")
    length, tokens = _rules.length, sum(len(document.ids) for document in documents)
    if not length or tokens <= length:
        return Outcome(where=where, kind=kind, documents=documents, judged=judged)
    if _rules.too_long == "error":
        what = "its two answers with their prompts have" if kind == "pairs" else "it has"
        how = "drop" if kind == "pairs" else "drop or cut"
        raise BadRow(TOO_LONG, f"{what} {tokens:,} tokens, more than --length {length:,}: use --too-long {how}")
    if _rules.too_long == "drop":
        return Outcome(where=where, kind=kind, reason=TOO_LONG)
    (whole,) = documents
    kept = whole.cut(length)
    if not kept.learned:
        return Outcome(where=where, kind=kind, reason=NOTHING_LEFT)
    lost = whole.learned - kept.learned
    return Outcome(where=where, kind=kind, documents=(kept,), cut=tokens - length, cut_learned=lost)


def _batches(corpus: Corpus, counts: ReadCounts) -> Iterator[_Lines]:
    batch: _Lines = []
    size = 0
    for source in corpus.sources:
        for where, line in read_lines(source, counts):
            batch.append((where, line))
            size += len(line)
            if size > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def checked(rules: Rules, corpus: Corpus, workers: int) -> Iterator[Outcome]:
    """The outcome of every line as far as it is known without tokenizing; these outcomes have no documents."""
    for batch in in_order(_check, _batches(corpus, ReadCounts()), workers, _start_worker, rules):
        yield from batch


def encoded_rows(rules: Rules, corpus: Corpus, counts: ReadCounts, workers: int) -> Iterator[Outcome]:
    """The outcome of every line, in order whatever the number of workers. ``counts`` says how far reading is."""
    for batch in in_order(_encode, _batches(corpus, counts), workers, _start_worker, rules):
        yield from batch
