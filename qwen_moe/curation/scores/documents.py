"""Documents of a corpus as datatrove writes them, ``{"text", "id", "metadata"}``, and the groups of files that are one
file of scores."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_moe.data.corpus import ReadCounts, Reading, read_rows
from qwen_moe.data.sources import Source
from qwen_moe.errors import UserError

_FILES, _BYTES = 512, 64 << 20  # of files with one document each: how many, and how much, make one file of scores
_PARTS = ("id", "metadata")


def json_line(values: Mapping[str, Any]) -> bytes:
    """A line of JSON in UTF-8, which ends with a line feed."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return json.dumps(values).encode() + b"\n"


@dataclass
class Document:
    """A document. ``where``: file and line."""

    text: str
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    def line(self) -> bytes:
        """A line of JSON, which ends with a line feed."""
        return json_line({"text": self.text, "id": self.id, "metadata": self.metadata})


def grouped(sources: Sequence[Source]) -> list[list[Source]]:
    """Each file of JSON lines or Parquet alone, and neighboring files of one document each together."""
    groups: list[list[Source]] = []
    joins = False
    for source in sources:
        last = groups[-1] if groups else []
        fits = len(last) < _FILES and sum(one.bytes for one in last) + source.bytes <= _BYTES
        if joins and not source.has_rows and fits:
            last.append(source)
        else:
            groups.append([source])
        joins = not source.has_rows
    return groups


def read(sources: Sequence[Source], counts: ReadCounts, reading: Reading) -> Iterator[Document]:
    """The documents of ``sources``. Without an id of its own, a document has its file and line as one. Keys of a line, and
    columns of Parquet, that are none of datatrove's become metadata, as datatrove does it. Raises UserError for a line that
    is no document."""
    for source in sources:
        for where, row in read_rows(source, counts, reading):
            given = row.get("metadata")
            if given is not None and not isinstance(given, dict):
                raise UserError(f"{where}: metadata is {type(given).__name__}, expected an object")
            others = {key: value for key, value in row.items() if key not in (*_PARTS, reading.text_key)}
            metadata = others | (given or {})
            metadata.setdefault("file_path", str(source.path))
            name = row.get("id")
            known = isinstance(name, str | int) and not isinstance(name, bool) and name != ""
            yield Document(row[reading.text_key], str(name) if known else where, metadata, where)
