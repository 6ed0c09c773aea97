"""Corpus to Megatron's `.bin/.idx`: tokenised by several processes, in order, and never half there."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_moe.data.corpus import BadUtf8, ReadCounts, Source, find_sources, read_documents
from qwen_moe.data.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from qwen_moe.errors import UserError

# The tokenizer is trained on at most this much text, taken evenly over the corpus.
TOKENIZER_SAMPLE_BYTES = 200_000_000
_BATCH_CHARACTERS = 400_000


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What lies behind a prefix: the content of `PREFIX.json`."""

    documents: int
    tokens: int
    text_bytes: int
    max_token_id: int
    end_of_document_id: int
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    skipped: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str
    request: str


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def trained_tokenizer_path(prefix: Path) -> Path:
    """Where a tokenizer trained with the data lies."""
    return prefix.with_name(prefix.name + "-tokenizer")


def read_manifest(prefix: Path) -> PreparedData | None:
    """The manifest beside a prefix, or None where there is none (data made by other tools)."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return PreparedData(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of prepared data ({error}): delete it and prepare again") from None


def prepare(
    inputs: Sequence[str],
    prefix: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = 0,
    text_key: str = "text",
    on_bad_utf8: BadUtf8 = "error",
    workers: int = 0,
    overwrite: bool = False,
) -> tuple[PreparedData, bool]:
    """Tokenise ``inputs`` into ``prefix``.bin/.idx; (what is there now, whether anything was done).

    With ``tokenizer`` None, one of ``vocab_size`` is trained first, into ``prefix``-tokenizer. Every document is closed
    by <|endoftext|>. The output does not depend on ``workers`` (0: one per core). Nothing is done when the same request
    is already there; another one is refused unless ``overwrite``. Files appear under their names only when whole.
    """
    sources = find_sources(inputs)
    if tokenizer is not None:
        load_tokenizer(tokenizer)
    request = _request(sources, tokenizer, vocab_size, text_key, on_bad_utf8)
    existing = read_manifest(prefix)
    if existing is not None and _is_whole(prefix, existing):
        if existing.request == request:
            return existing, False
        if not overwrite:
            raise UserError(
                f"{prefix}.bin was prepared from other inputs or with other settings: use --overwrite, or another output"
            )
    elif existing is None and bin_path(prefix).exists() and not overwrite:
        raise UserError(f"{bin_path(prefix)} exists and has no manifest: use --overwrite, or another output")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    directory = tokenizer
    if directory is None:
        directory = trained_tokenizer_path(prefix)
        print(f"training a tokenizer of {vocab_size:,} tokens into {directory}", file=sys.stderr)
        train_tokenizer(_sample(sources, text_key, on_bad_utf8), vocab_size, directory)
    with _no_partial_left(prefix):
        return _tokenise(sources, prefix, directory, request, text_key, on_bad_utf8, workers), True


def _request(sources: list[Source], tokenizer: Path | None, *settings: Any) -> str:
    """A hash of everything that decides the output: files by path, size and time of change, tokenizer, settings."""
    digest = hashlib.sha256()
    for source in sources:
        stat = source.path.stat()
        digest.update(f"{source.path}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    digest.update((tokenizer_hash(tokenizer) if tokenizer else "trained").encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def _is_whole(prefix: Path, manifest: PreparedData) -> bool:
    data = bin_path(prefix)
    return data.is_file() and data.stat().st_size == manifest.bin_bytes and idx_path(prefix).is_file()


def _sample(sources: list[Source], text_key: str, on_bad_utf8: BadUtf8) -> Iterator[str]:
    """Documents for training the tokenizer: all of a small corpus, every n-th file of a large one, up to the limit."""
    total = sum(source.bytes for source in sources)
    every = max(1, total // TOKENIZER_SAMPLE_BYTES)
    given = 0
    for source in sources[::every]:
        for text in read_documents(source, ReadCounts(), text_key, on_bad_utf8):
            yield text
            given += len(text)
            if given > TOKENIZER_SAMPLE_BYTES:
                return


@contextlib.contextmanager
def _no_partial_left(prefix: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in (bin_path(prefix), idx_path(prefix)):
            _partial(path).unlink(missing_ok=True)
        raise


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


_tokenizer: Any = None
_end_of_document = 0


def _start_worker(directory: str) -> None:
    global _tokenizer, _end_of_document
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(Path(directory))
    _end_of_document = end_of_document_id(_tokenizer, Path(directory))


def _encode(texts: list[str]) -> list[list[int]]:
    return [[*encoding.ids, _end_of_document] for encoding in _tokenizer.encode_batch(texts, add_special_tokens=False)]


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


def _encoded(directory: Path, documents: Iterator[str], workers: int) -> Iterator[list[list[int]]]:
    """Token ids of every document, in order; at most a few batches per worker are read ahead."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        _start_worker(str(directory))
        yield from map(_encode, _batches(documents))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start_worker, initargs=(str(directory),)) as pool:
        batches = _batches(documents)
        pending = [pool.apply_async(_encode, (batch,)) for batch in itertools.islice(batches, 3 * workers)]
        while pending:
            done = pending.pop(0).get()
            pending.extend(pool.apply_async(_encode, (batch,)) for batch in itertools.islice(batches, 1))
            yield done


def _tokenise(
    sources: list[Source],
    prefix: Path,
    directory: Path,
    request: str,
    text_key: str,
    on_bad_utf8: BadUtf8,
    workers: int,
) -> PreparedData:
    import torch

    from qwen_moe.data.megatron import DType, IndexedDatasetBuilder

    tokenizer = load_tokenizer(directory)
    vocabulary = vocabulary_size(tokenizer)
    counts = ReadCounts()
    bar = tqdm(total=sum(s.bytes for s in sources), unit="B", unit_scale=True, desc="tokenise", file=sys.stderr)

    def documents() -> Iterator[str]:
        for source in sources:
            yield from read_documents(source, counts, text_key, on_bad_utf8)

    data, index = bin_path(prefix), idx_path(prefix)
    builder = IndexedDatasetBuilder(str(_partial(data)), dtype=DType.optimal_dtype(vocabulary))
    found = tokens = text_bytes = 0
    largest = -1
    with bar:
        for batch in _encoded(directory, documents(), workers):
            for ids in batch:
                builder.add_item(torch.tensor(ids, dtype=torch.int64))
                builder.end_document()
                found, tokens, largest = found + 1, tokens + len(ids), max(largest, max(ids))
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(counts.bytes - bar.n)
        text_bytes = counts.bytes
    if not found:
        builder.data_file.close()
        raise UserError("the corpus has no document with text in it: all are empty or were skipped")
    builder.finalize(str(_partial(index)))
    prepared = PreparedData(
        documents=found,
        tokens=tokens,
        text_bytes=text_bytes,
        max_token_id=largest,
        end_of_document_id=end_of_document_id(tokenizer, directory),
        vocab_size=vocabulary,
        tokenizer=str(directory),
        tokenizer_sha256=tokenizer_hash(directory),
        skipped=len(counts.skipped),
        bin_bytes=_partial(data).stat().st_size,
        bin_sha256=_sha256(_partial(data)),
        idx_sha256=_sha256(_partial(index)),
        request=request,
    )
    # The manifest goes first and comes last: while it is away, the pair is not taken for prepared data.
    manifest_path(prefix).unlink(missing_ok=True)
    os.replace(_partial(index), index)
    os.replace(_partial(data), data)
    partial = _partial(manifest_path(prefix))
    partial.write_text(json.dumps(asdict(prepared), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, manifest_path(prefix))
    if counts.skipped:
        more = ", ..." if len(counts.skipped) > 3 else ""
        named = ", ".join(counts.skipped[:3])
        print(f"{len(counts.skipped)} documents skipped, not decodable: {named}{more}", file=sys.stderr)
    return prepared


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return digest.hexdigest()
