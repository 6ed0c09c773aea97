"""Tokenizes a corpus into Megatron's `.bin/.idx`, in several processes; the output appears complete or not at all."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from qwen_moe.alone import alone
from qwen_moe.data.checked import carried
from qwen_moe.data.content import sample_sha256
from qwen_moe.data.corpus import ReadCounts, Reading, read_documents
from qwen_moe.data.encode import check_workers, encoded
from qwen_moe.data.manifest import (
    PreparedData,
    bin_path,
    check_prefix_name,
    idx_path,
    partial_path,
    read_manifest,
    trained_tokenizer_path,
)
from qwen_moe.data.output import (
    Digested,
    Watch,
    being_made,
    damage,
    no_partial_left,
    put_in_place,
    settled,
    synced,
)
from qwen_moe.data.packed import check_unpackers
from qwen_moe.data.sources import Corpus, MissingInput, find_corpus
from qwen_moe.data.tokenizer import (
    check_vocabulary_size,
    end_of_document_id,
    load_tokenizer,
    tokenizer_hash,
    tokenizer_identity,
    train_tokenizer,
    vocabulary_size,
)
from qwen_moe.errors import UserError
from qwen_moe.progress import style

# The tokenizer is trained on at most this much text, sampled evenly over the corpus.
TOKENIZER_SAMPLE_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Request(Digested):
    """What decides the tokens of an output, in addition to the content of its inputs."""

    inputs: tuple[str, ...]
    tokenizer: Path | None = None
    vocab_size: int = 0
    reading: Reading = field(default_factory=Reading)

    def _digest(self, lines: list[bytes]) -> str:
        reading = self.reading
        settings: tuple[object, ...] = (self.vocab_size, reading.text_key, reading.on_bad_utf8)
        if reading.on_bad_line != "error":
            settings += (reading.on_bad_line,)
        digest = hashlib.sha256(b"".join(lines))
        digest.update((tokenizer_hash(self.tokenizer) if self.tokenizer else "trained").encode())
        digest.update(repr(settings).encode())
        return digest.hexdigest()


def prepare(
    request: Request, prefix: Path, *, workers: int = 0, overwrite: bool = False, without_inputs: bool = False
) -> tuple[PreparedData, bool]:
    """Tokenize ``request``'s inputs into ``prefix``.bin/.idx. Returns (the manifest, whether anything was done).

    Without a tokenizer, one of ``vocab_size`` is trained first, in ``prefix``-tokenizer. Every document ends with
    <|endoftext|>. The output does not depend on ``workers`` (0: one per core). If the same request was already prepared
    from equal content, nothing is done. An output of another request raises OtherDataThere unless ``overwrite``.
    ``without_inputs``: use an existing output even if its inputs no longer exist. Files appear under their names only when
    they are complete.
    """
    check_prefix_name(prefix)
    workers = check_workers(workers)
    if request.tokenizer is None:
        check_vocabulary_size(request.vocab_size)
    else:
        end_of_document_id(load_tokenizer(request.tokenizer), request.tokenizer)
    try:
        corpus = find_corpus(request.inputs)
    except MissingInput as error:
        existing = read_manifest(prefix)
        if not without_inputs or existing is None or existing.settings != request.settings():
            raise
        if problem := damage(prefix, existing, request):
            raise UserError(f"{error}, and it is needed: {problem}") from None
        print(f"{error}; {bin_path(prefix)}, which was made from it before, is used", file=sys.stderr)
        return existing, False
    if (existing := settled(request, corpus, prefix, overwrite)) is not None:
        return existing, False
    check_unpackers(source.path for source in corpus.sources)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with alone(prefix), no_partial_left(prefix):
        # Another process may have prepared it in the meantime.
        if (existing := settled(request, corpus, prefix, overwrite)) is not None:
            return existing, False
        if bin_path(prefix).exists() and not overwrite and (existing := read_manifest(prefix)) is not None:
            print(f"made again: {damage(prefix, existing, request)}", file=sys.stderr)
        print(f"reading {corpus}", file=sys.stderr)
        watch, by_status = Watch(corpus.sources), request.by_status(corpus.sources)
        directory = request.tokenizer
        if directory is None:
            directory = trained_tokenizer_path(prefix)
            print(f"training a tokenizer of {request.vocab_size:,} tokens in {directory}", file=sys.stderr)
            directory = being_made(directory)
            train_tokenizer(_sample(corpus, request.reading), request.vocab_size, directory)
        prepared = replace(_tokenise(request, corpus, prefix, directory, workers), request=by_status)
        watch.check()
        put_in_place(prefix, prepared, None if request.tokenizer else directory)
        return prepared, True


def _sample(corpus: Corpus, reading: Reading) -> Iterator[str]:
    """Documents for training the tokenizer: all of a small corpus, or every n-th file of a large one up to the limit."""
    every = max(1, corpus.bytes // TOKENIZER_SAMPLE_BYTES)
    given = 0
    for source in corpus.sources[::every]:
        for text in read_documents(source, ReadCounts(), reading):
            yield text
            given += len(text)
            if given > TOKENIZER_SAMPLE_BYTES:
                return


def _tokenise(request: Request, corpus: Corpus, prefix: Path, directory: Path, workers: int) -> PreparedData:
    """Write everything under temporary names."""
    import torch

    from qwen_moe.data.megatron import DType, IndexedDatasetBuilder

    tokenizer = load_tokenizer(directory)
    vocabulary = vocabulary_size(tokenizer)
    counts = ReadCounts()
    bar = tqdm(total=corpus.bytes, unit="B", unit_scale=True, desc="tokenize", **style())

    def documents() -> Iterator[str]:
        for source in corpus.sources:
            yield from read_documents(source, counts, request.reading)

    data, index = partial_path(bin_path(prefix)), partial_path(idx_path(prefix))
    builder = IndexedDatasetBuilder(str(data), dtype=DType.optimal_dtype(vocabulary))
    found = tokens = 0
    largest = -1
    with bar:
        for batch in encoded(directory, documents(), workers):
            for ids in batch:
                builder.add_item(torch.tensor(ids, dtype=torch.int64))
                builder.end_document()
                found, tokens, largest = found + 1, tokens + len(ids), max(largest, max(ids))
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(counts.bytes - bar.n)
    if counts.left_out.counts:
        print(f"documents left out: {counts.left_out}", file=sys.stderr)
    if not found:
        builder.data_file.close()
        raise UserError("the corpus has no document with text: all are empty or were skipped; give other --input")
    builder.finalize(str(index))
    trained = request.tokenizer is None
    return PreparedData(
        documents=found,
        tokens=tokens,
        text_bytes=counts.bytes,
        max_token_id=largest,
        end_of_document_id=end_of_document_id(tokenizer, directory),
        vocab_size=vocabulary,
        tokenizer=str(trained_tokenizer_path(prefix) if trained else directory),
        tokenizer_sha256=tokenizer_hash(directory),
        tokenizer_identity=tokenizer_identity(tokenizer),
        skipped=counts.skipped,
        bin_bytes=data.stat().st_size,
        bin_sha256=synced(data),
        bin_sample_sha256=sample_sha256(data),
        bin_mtime_ns=data.stat().st_mtime_ns,
        idx_sha256=synced(index),
        request="",  # `prepare` adds it
        content=request.by_content(corpus.sources, counts.digests),
        settings=request.settings(),
        files=len(corpus.sources),
        left_out=corpus.left_out.counts | counts.left_out.counts,
        decontaminated=carried(corpus.sources, counts.digests),
    )
