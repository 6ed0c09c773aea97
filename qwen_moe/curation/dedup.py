"""Deduplication by the library: equal texts in three stages, similar ones by MinHash in four; clusters by name."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_text
from qwen_moe.curation.documents import DROPPED, KEPT, Lines, Shard, read_file
from qwen_moe.curation.execute import Stage
from qwen_moe.curation.library import (
    Document,
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    HashConfig,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
    PipelineStep,
    create_hash_func,
)
from qwen_moe.curation.recipe import DeduplicationSection, MinHashSection
from qwen_moe.curation.words import word_tokenizer
from qwen_moe.errors import UserError

EXACT, MINHASH = "exact", "minhash"
CLUSTERS, WORK = "clusters.jsonl", "work"
_ID, _COUNT = "minhash_cluster_id", "duplicate_count"  # the library's metadata


def content(document: Document) -> str:
    """What is hashed for exact deduplication."""
    return document.text


class NoteKept(PipelineStep):
    """Writes the ids of documents that were kept of a cluster, and drops the library's marks of those that are in none."""

    type, name = "note", "kept of clusters"

    def __init__(self, folder: Path, key: str) -> None:
        super().__init__()
        self.folder, self.key = str(folder), key

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        found = []
        for document in data:
            mark = document.metadata.pop(self.key, -1)
            if self.key == _COUNT and mark > 0:
                found.append([document.text, document.id])
            elif self.key == _ID and mark >= 0:
                found.append([mark, document.id])
            yield document
        write_text(Path(self.folder) / f"{rank:05d}.jsonl", "".join(json.dumps(one) + "\n" for one in found))


def minhash_config(section: MinHashSection) -> MinhashConfig:
    """Raises UserError for a hash that cannot be computed here."""
    hashing = HashConfig(precision=section.precision, hash_fc=section.hash_fc)
    try:
        create_hash_func(hashing)("text")
    except (ImportError, TypeError) as error:
        raise UserError(
            f"deduplication.minhash.hash_fc = {section.hash_fc!r} cannot be computed ({error}): the library needs xxhash of "
            "a version below 4; use hash_fc: sha1"
        ) from None
    return MinhashConfig(
        n_grams=section.n_grams,
        num_buckets=section.num_buckets,
        hashes_per_bucket=section.hashes_per_bucket,
        seed=section.seed,
        hash_config=hashing,
    )


def deduplicate(section: DeduplicationSection, words: str, before: Path, folder: Path, tasks: int) -> Iterator[Stage]:
    """The stages that deduplicate the documents of ``before`` into ``folder``, which has their clusters at the end."""
    work = folder / WORK
    if section.exact:
        unique = Lines(folder if section.minhash is None else work / "unique")
        yield from _exact(before, folder, unique, tasks)
        before = work / "unique" / KEPT
    if section.minhash is not None:
        yield from _minhash(minhash_config(section.minhash), words, before, folder, tasks)
    write_text(folder / CLUSTERS, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in _clusters(folder)))


def _exact(before: Path, folder: Path, unique: Lines, tasks: int) -> Iterator[Stage]:
    work, config = (
        folder / WORK / EXACT,
        ExactDedupConfig(content, hash_config=HashConfig(precision=64, hash_fc="sha1")),
    )
    signatures, found = str(work / "signatures"), str(work / "duplicates")
    yield Stage("exact-1", [Shard(before), ExactDedupSignature(signatures, config)], tasks, folder)
    yield Stage("exact-2", [ExactFindDedups(signatures, found, config)], 1, folder)
    Path(found).mkdir(parents=True, exist_ok=True)
    drop = ExactDedupFilter(found, config, Lines(folder, filter=EXACT, reason="equal_text"))
    yield Stage("exact-3", [Shard(before), drop, NoteKept(work / KEPT, _COUNT), unique], tasks, folder)


def _minhash(config: MinhashConfig, words: str, before: Path, folder: Path, tasks: int) -> Iterator[Stage]:
    work = folder / WORK / MINHASH
    signatures, buckets, clusters = (str(work / name) for name in ("signatures", "buckets", "clusters"))
    sign = MinhashDedupSignature(signatures, config, language=word_tokenizer(words))
    yield Stage("minhash-1", [Shard(before), sign], tasks, folder)
    yield Stage("minhash-2", [MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets, folder)
    yield Stage("minhash-3", [MinhashDedupCluster(buckets, clusters, config, save_cluster_id=True)], 1, folder)
    for rank in range(tasks):  # without these the filter would not mark what it keeps of a cluster
        for ending in ("remove", "clusters"):
            path = Path(clusters) / f"{rank:06d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    drop = MinhashDedupFilter(clusters, Lines(folder, filter=MINHASH, reason="similar_text"), load_cluster_ids=True)
    yield Stage("minhash-4", [Shard(before), drop, NoteKept(work / KEPT, _ID), Lines(folder)], tasks, folder)


def _clusters(folder: Path) -> Iterator[dict[str, Any]]:
    """Of each cluster the document that was kept and those that were dropped for it, in the order of the kept ones."""
    for kind in (EXACT, MINHASH):
        dropped: dict[Any, list[str]] = defaultdict(list)
        for path in sorted((folder / DROPPED / kind).glob("*.jsonl")):
            for row in read_file(path):
                dropped[row["text"] if kind == EXACT else row["metadata"][_ID]].append(row["id"])
        for path in sorted((folder / WORK / kind / KEPT).glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                mark, kept = json.loads(line)
                if mark in dropped:
                    yield {"kind": kind, "kept": kept, "dropped": dropped[mark]}


def clean(folder: Path) -> None:
    """Remove what only the stages needed."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
