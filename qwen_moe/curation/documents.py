"""Documents on disk: a JSON object a line, {"text", "id", "metadata"}, with counts of each file beside it."""

import collections
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from launchers.folder.atomic import write_json
from launchers.folder.run_folder import read_json
from qwen_moe.curation.library import BaseReader, DiskWriter, Document
from qwen_moe.curation.scores.documents import json_line

KEPT, DROPPED, TALLY = "kept", "dropped", "tally"
HIDDEN = "_"  # metadata that begin so are of one task only, and not written


def file_name(rank: int) -> str:
    return f"{rank:05d}.jsonl"


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of documents; none if it does not exist, because a task without documents writes none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


class Shard(BaseReader):
    """Reads the documents that a task of an earlier step left in ``folder``."""

    name = "documents"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for row in read_file(Path(self.folder) / file_name(rank)):
            yield Document(text=row["text"], id=row["id"], metadata=row["metadata"])


class Lines(DiskWriter):
    """Writes documents to ``folder``/kept or ``folder``/dropped/``filter``, and what they are to ``folder``/tally.

    ``reason``: of dropped documents without a metadata["filter_reason"]. ``by_domain``: a folder for each domain.
    """

    default_output_filename = "${rank}.jsonl"
    name = "documents"

    def __init__(self, folder: Path, filter: str = "", reason: str = "", by_domain: bool = False) -> None:
        target = folder / (f"{DROPPED}/{filter}" if filter else KEPT)
        super().__init__(
            str(target),
            output_filename="${domain}/${rank}.jsonl" if by_domain else None,
            compression=None,
            adapter=_row,
            mode="wb",
        )
        self.tally_folder, self.filter, self.reason = str(folder / TALLY / (filter or KEPT)), filter, reason
        self.tally: Tally | None = None

    def write(self, document: Document, rank: int = 0, **kwargs: Any) -> None:
        if self.filter:
            document.metadata["filter"] = self.filter
            document.metadata.setdefault("filter_reason", self.reason or self.filter)
        if self.tally is None:
            self.tally = Tally(rank)
        self.tally.add(document)
        super().write(document, rank, **kwargs)

    def _write(self, document: dict[str, Any], file_handler: IO[bytes], _filename: str) -> None:
        file_handler.write(json_line(document))

    def close(self) -> None:
        super().close()
        if self.tally is not None:
            write_json(Path(self.tally_folder) / f"{self.tally.rank:05d}.json", self.tally.counts())
            self.tally = None


def _row(_writer: Lines, document: Document) -> dict[str, Any]:
    metadata = {key: value for key, value in document.metadata.items() if not key.startswith(HIDDEN)}
    return {"text": document.text, "id": document.id, "metadata": metadata}


class Tally:
    """What the documents of one file are: counts by domain, by reason, and of their scores, rounded to three digits."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.documents: collections.Counter[str] = collections.Counter()
        self.characters: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.edited: collections.Counter[str] = collections.Counter()
        self.scores: dict[str, collections.Counter[str]] = {}

    def add(self, document: Document) -> None:
        metadata = document.metadata
        domain = str(metadata.get("domain", ""))
        self.documents[domain] += 1
        self.characters[domain] += len(document.text)
        if "filter_reason" in metadata:
            self.reasons[str(metadata["filter_reason"])] += 1
        self.edited.update(list(metadata.get("edited", ())))
        for name, value in (metadata.get("scores") or {}).items():
            self.scores.setdefault(name, collections.Counter())[f"{value:.3g}"] += 1

    def counts(self) -> dict[str, Any]:
        named = ("documents", "characters", "reasons", "edited")
        found: dict[str, Any] = {name: dict(sorted(getattr(self, name).items())) for name in named}
        return found | {"scores": {name: dict(sorted(counts.items())) for name, counts in sorted(self.scores.items())}}


def tallied(folder: Path) -> dict[str, dict[str, Any]]:
    """The tallies of a step's ``folder`` added up: of what was kept under `kept`, of each filter under its name."""
    found: dict[str, dict[str, Any]] = {}
    for each in sorted((folder / TALLY).glob("*/")):
        total: dict[str, Any] = {}
        for path in sorted(each.glob("*.json")):
            _add(total, read_json(path) or {})
        found[each.name] = total
    return found


def _add(total: dict[str, Any], counts: Mapping[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
