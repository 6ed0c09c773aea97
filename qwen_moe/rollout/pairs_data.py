"""Pairs of sampled answers as token files, in the format of `qwen-moe data chat`: documents 2p and 2p + 1 are the chosen and
the rejected answer of pair p, each after its prompt, and only the answers are learned. Tokens are those that were sampled.

`PREFIX.pairs.jsonl` says where each pair comes from: query id, numbers of the samples, rewards.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launchers.counted import counted, tallied
from launchers.folder.atomic import replaced
from qwen_moe.alone import alone
from qwen_moe.data.chat import Chat, Encoded
from qwen_moe.data.chat_rows import Outcome
from qwen_moe.data.content import sample_sha256
from qwen_moe.data.conversations import PREFERENCE
from qwen_moe.data.manifest import LEARN, PREFERENCES, PreparedData, check_prefix_name
from qwen_moe.data.output import Digested, no_partial_left, put_in_place, settled, synced
from qwen_moe.data.prepare_chat import Writer, template_sha256
from qwen_moe.data.sources import Corpus, Source
from qwen_moe.data.tokenizer import load_tokenizer, tokenizer_hash, tokenizer_identity, vocabulary_size
from qwen_moe.errors import UserError
from qwen_moe.rollout.pairs import Pair, PairRules, pairs_of
from qwen_moe.rollout.store import MANIFEST, TOKENIZER, Row, read_rollouts

TOO_LONG = "pairs longer than --length"


@dataclass(frozen=True, kw_only=True)
class PairsRequest(Digested):
    """What decides the tokens of an output. ``length``: the most tokens of both answers with their prompts; 0: any."""

    rollouts: Path
    rules: PairRules = field(default_factory=PairRules)
    length: int = 0

    @property
    def tokenizer(self) -> Path:
        return self.rollouts / TOKENIZER

    def _digest(self, lines: list[bytes]) -> str:
        digest = hashlib.sha256(b"".join(lines))
        digest.update(repr(("pairs", astuple(self.rules), self.length)).encode())
        return digest.hexdigest()


def provenance_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.pairs.jsonl")


def prepare_pairs(request: PairsRequest, prefix: Path, *, overwrite: bool = False) -> tuple[PreparedData, bool]:
    """Write the pairs of finished rollouts. Returns (the manifest, whether anything was done), like `prepare_chat`. Raises
    UserError for rollouts that are damaged or not finished, and if they give no pair."""
    check_prefix_name(prefix)
    manifest, rows = read_rollouts(request.rollouts)
    path = request.rollouts / MANIFEST  # holds the hashes of all others
    corpus = Corpus(sources=[Source(path=path, kind="jsonl", bytes=path.stat().st_size)])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with alone(prefix), no_partial_left(prefix, (LEARN, PREFERENCES)):
        existing = settled(request, corpus, prefix, overwrite)
        if existing is not None and provenance_path(prefix).is_file():
            return existing, False
        writer = Writer(prefix, "pairs", manifest["sampling"]["vocab_size"])
        with contextlib.closing(writer):
            left_out, queries = _write(request, rows, writer, provenance_path(prefix))
        prepared = _prepared(request, corpus, writer, manifest, left_out, queries)
        put_in_place(prefix, prepared, None)
    return prepared, True


def _write(request: PairsRequest, rows: Any, writer: Writer, provenance: Path) -> tuple[Counter[str], dict[str, int]]:
    """What was left out, by reason, and the numbers of queries and of those without a pair."""
    left_out: Counter[str] = Counter()
    judged = {PREFERENCE: 1}
    queries = without = 0
    with replaced(provenance) as file:
        for row in rows:
            queries += 1
            found = [pair for pair in pairs_of(row, request.rules, left_out) if _fits(row, pair, request, left_out)]
            without += not found
            for pair in found:
                writer.add(Outcome(where=str(row["id"]), kind="pairs", documents=_documents(row, pair), judged=judged))
                file.write(json.dumps(_provenance(row, pair)).encode() + b"\n")
        if not writer.documents:
            more = f" (left out: {_listed(left_out)})" if left_out else ""
            raise UserError(
                f"{request.rollouts} gives no pair of {counted(queries, 'query')}: {request.rules.lacking}{more}. "
                "Sample more "
                "or longer answers or at a higher temperature, or use other rules"
            )
    return left_out, {"queries": queries, "queries_without_pair": without}


def _fits(row: Row, pair: Pair, request: PairsRequest, left_out: Counter[str]) -> bool:
    samples = row["samples"]
    tokens = 2 * len(row["prompt_tokens"])
    tokens += len(samples[pair.chosen]["tokens"]) + len(samples[pair.rejected]["tokens"])
    if request.length and tokens > request.length:
        left_out[TOO_LONG] += 1
        return False
    return True


def _documents(row: Row, pair: Pair) -> tuple[Encoded, ...]:
    """Chosen and rejected, each after the prompt. Only the answer is learned, with the end token that was sampled."""
    return tuple(_document(row["prompt_tokens"], row["samples"][n]["tokens"]) for n in (pair.chosen, pair.rejected))


def _document(prompt: Sequence[int], answer: Sequence[int]) -> Encoded:
    learn = np.zeros(len(prompt) + len(answer), np.uint8)
    learn[len(prompt) :] = 1
    return Encoded(ids=np.array([*prompt, *answer], np.int64), learn=learn)


def _provenance(row: Row, pair: Pair) -> dict[str, Any]:
    chosen, rejected = row["samples"][pair.chosen], row["samples"][pair.rejected]
    return {
        "query": row["id"],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "chosen_reward": chosen["reward"],
        "rejected_reward": rejected["reward"],
        "rejected_truncated": rejected["finish_reason"] == "length",
    }


def _prepared(
    request: PairsRequest,
    corpus: Corpus,
    writer: Writer,
    manifest: dict[str, Any],
    left_out: Counter[str],
    queries: dict[str, int],
) -> PreparedData:
    tokenizer = load_tokenizer(request.tokenizer)
    end, template = _end_and_template(request.tokenizer, manifest["sampling"]["end_tokens"])
    (source,) = corpus.sources
    return PreparedData(
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=source.bytes,
        max_token_id=writer.largest,
        end_of_document_id=end,
        vocab_size=max(vocabulary_size(tokenizer), writer.largest + 1),
        tokenizer=str(request.tokenizer),
        tokenizer_sha256=tokenizer_hash(request.tokenizer),
        tokenizer_identity=tokenizer_identity(tokenizer),
        skipped=queries["queries_without_pair"],
        bin_bytes=writer.bin.stat().st_size,
        bin_sha256=synced(writer.bin),
        bin_sample_sha256=sample_sha256(writer.bin),
        bin_mtime_ns=writer.bin.stat().st_mtime_ns,
        idx_sha256=synced(writer.idx),
        request=request.by_status(corpus.sources),
        content=request.by_content(corpus.sources, [source.sha256()]),
        settings=request.settings(),
        files=1,
        left_out=dict(sorted(left_out.items())),
        kind="pairs",
        columns={name: synced(path) for name, path in writer.columns.items()},
        criteria=writer.criteria,
        counts=writer.counts | queries,
        template_sha256=template,
    )


def _end_and_template(tokenizer: Path, end_tokens: Sequence[int]) -> tuple[int, str]:
    """The token that ends an answer, which pads rows, and the hash of the chat template as `data chat` records it."""
    try:
        chat = Chat(tokenizer)
        return chat.end, template_sha256(chat)
    except UserError:  # no template, or one that cannot be used for training: prompts were plain text
        return (end_tokens[-1] if end_tokens else 0), ""


def _listed(left_out: Counter[str]) -> str:
    return ", ".join(tallied(count, reason) for reason, count in sorted(left_out.items()))


def described(prepared: PreparedData) -> str:
    """What was written, in a line."""
    counts = prepared.counts
    text = (
        f"{counted(counts['pairs'], 'pair')} of {counted(counts['queries'], 'query')}, "
        f"{counted(prepared.tokens, 'token')}, "
    )
    text += f"{counts['learned_tokens']:,} of them learned, the longest {counts['longest']:,}"
    if counts["queries_without_pair"]:
        text += f"; {counted(counts['queries_without_pair'], 'query')} without a pair"
    left_out = _listed(Counter(prepared.left_out))
    return text + (f"; left out: {left_out}" if left_out else "")
