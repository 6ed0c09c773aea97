"""Domains re-weighted: which documents are left out and which are repeated, so that each domain has its share of tokens."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launchers.folder.atomic import replaced
from qwen_moe.curation.documents import Lines
from qwen_moe.curation.library import Document, PipelineStep
from qwen_moe.curation.recipe import OTHER, WeightsSection, check_domain
from qwen_moe.errors import UserError

_ROW = np.dtype([("hash", "<u8"), ("tokens", "<u4")])
_BATCH = 256
DOWN, UP = "down_sampled", "copy"


def hash_of(seed: int, identity: str) -> int:
    """64 bits that decide whether a document is kept, whatever the order and the number of tasks."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{identity}".encode(), digest_size=8).digest(), "little")


class Count(PipelineStep):
    """Counts the tokens of every document, its end included, into ``folder``/DOMAIN."""

    type, name = "count", "tokens"

    def __init__(self, tokenizer: Path, folder: Path, seed: int) -> None:
        super().__init__()
        self.tokenizer, self.folder, self.seed = str(tokenizer), str(folder), seed

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        from qwen_moe.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(Path(self.tokenizer))
        found: dict[str, list[tuple[int, int]]] = {}
        batch: list[Document] = []

        def count() -> None:
            encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                rows = found.setdefault(domain_of(document), [])
                rows.append((hash_of(self.seed, document.id), len(encoding.ids) + 1))
            batch.clear()

        for document in data:
            batch.append(document)
            if len(batch) == _BATCH:
                count()
            yield document
        count()
        for domain, rows in found.items():
            with replaced(Path(self.folder) / domain / f"{rank:05d}.npy") as file:
                np.save(file, np.array(rows, dtype=_ROW))


def domain_of(document: Document) -> str:
    """Raises UserError for a domain that cannot be a folder."""
    name = str(document.metadata.get("domain") or OTHER)
    try:
        return check_domain(name)
    except ValueError as error:
        raise UserError(
            f"document {document.id}: {error}. Its own key domain counts before the input's: rename the key, or correct it"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Share:
    """What is done to a domain: every document is there ``copies`` times, and those whose hash is below ``threshold`` once
    more. ``repeats``: how often the mean token is there. ``target``: the wanted share, None if it was not given."""

    documents: int
    tokens: int
    target: float | None
    wanted: int
    repeats: float
    copies: int
    threshold: int
    documents_after: int
    tokens_after: int


def plan(counts: Path, section: WeightsSection) -> dict[str, Share]:
    """The shares of all domains whose documents were counted in ``counts``. Raises UserError for targets that cannot be
    reached, with the number of repeats that they need."""
    rows = {folder.name: _rows(folder) for folder in sorted(counts.glob("*/"))}
    tokens = {name: int(found["tokens"].sum()) for name, found in rows.items()}
    shares = wanted_shares(tokens, section.targets)
    total = section.tokens or sum(tokens.values())
    found = {}
    mistakes = []
    for name, share in shares.items():
        wanted = round(share * total) if section.targets or section.tokens else tokens[name]
        repeats = wanted / tokens[name]
        if repeats > section.max_repeats:
            mistakes.append(
                f"{name} has {tokens[name]:,} tokens, and a share of {share:.3g} of {total:,} is {wanted:,}: each of its "
                f"documents would be needed {repeats:.2f} times, and max_repeats is {section.max_repeats:g} "
                f"(enough for tokens: {int(section.max_repeats * tokens[name] / share):,})"
            )
        found[name] = _share(rows[name], wanted, repeats, section.targets.get(name))
    if mistakes:
        raise UserError(
            "weights: "
            + "; ".join(mistakes)
            + ". Raise max_repeats, lower the target or the total number of tokens, or give "
            "more text"
        )
    if not any(share.tokens_after for share in found.values()):
        raise UserError("weights: no document is left: raise the total number of tokens")
    return found


def wanted_shares(tokens: Mapping[str, int], targets: Mapping[str, float]) -> dict[str, float]:
    """The share of each domain. Those without a target share what is left, in proportion to their tokens. Raises UserError
    for targets of domains that have no documents, and if nothing is left for a domain without a target."""
    absent = [name for name, share in targets.items() if share > 0 and not tokens.get(name)]
    if absent:
        raise UserError(
            f"weights: targets name {', '.join(absent)}, and no document of that domain is left (there are "
            f"{', '.join(sorted(tokens)) or 'none'}): correct the name, leave it out, or give more text"
        )
    others = sum(count for name, count in tokens.items() if name not in targets)
    left = 1 - math.fsum(targets.values())
    if others and targets and left < 1e-9:
        names = [name for name in sorted(tokens) if name not in targets]
        raise UserError(
            f"weights: targets sum to 1, so nothing is left for {', '.join(names)}: give each a share (0 leaves it out)"
        )
    if targets and not others:  # shares of what there is
        left, scale = 0.0, 1 / math.fsum(targets.values())
    else:
        scale = 1.0
    return {
        name: targets[name] * scale if name in targets else left * count / others
        for name, count in sorted(tokens.items())
    }


def _rows(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def _share(rows: np.ndarray, wanted: int, repeats: float, target: float | None) -> Share:
    """The documents with the smallest hashes are there once more, as many as come closest to ``wanted`` tokens."""
    tokens = int(rows["tokens"].sum())
    copies = int(repeats)
    ordered = np.sort(rows, order="hash")
    sums = np.concatenate([[0], np.cumsum(ordered["tokens"], dtype=np.int64)])
    more = int(np.argmin(np.abs(sums - (wanted - copies * tokens))))
    threshold = 2**64 if more == len(ordered) else int(ordered["hash"][more])
    return Share(
        documents=len(rows),
        tokens=tokens,
        target=target,
        wanted=wanted,
        repeats=repeats,
        copies=copies,
        threshold=threshold,
        documents_after=copies * len(rows) + more,
        tokens_after=copies * tokens + int(sums[more]),
    )


class Sample(PipelineStep):
    """Leaves documents out and repeats them as ``shares`` say. The second copy of a document has the id ID#2."""

    type, name = "sample", "weights"

    def __init__(self, shares: Mapping[str, Share], seed: int, folder: Path) -> None:
        super().__init__()
        self.shares, self.seed = {name: asdict(share) for name, share in shares.items()}, seed
        self.dropped = Lines(folder, filter="weights", reason=DOWN)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self.dropped as dropped:
            for document in data:
                domain = domain_of(document)
                document.metadata["domain"] = domain
                share = self.shares[domain]
                times = share["copies"] + (hash_of(self.seed, document.id) < share["threshold"])
                if not times:
                    dropped.write(document, rank)
                for number in range(1, times + 1):
                    yield document if number == 1 else copy_of(document, number)


def copy_of(document: Document, number: int) -> Document:
    return Document(text=document.text, id=f"{document.id}#{number}", metadata={**document.metadata, UP: number})
