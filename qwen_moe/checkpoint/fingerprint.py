"""Hashes that tell one model, or one tokenizer, from another without reading whole weights."""

import hashlib
import json
from pathlib import Path

_BLOCK, _BLOCKS = 4096, 64


def fingerprint(directory: Path) -> str:
    """A hash that tells the files of one model from those of another: names, sizes, and 64 blocks of each file.

    It does not read whole weights, so that a large model starts at once.
    """
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        size = path.stat().st_size
        found.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for place in sorted({max(size - _BLOCK, 0) * block // (_BLOCKS - 1) for block in range(_BLOCKS)}):
                file.seek(place)
                found.update(file.read(_BLOCK))
    return found.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """A hash of the files that decide how text becomes tokens."""
    found = hashlib.sha256()
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "tokenizer_config.json",
    )
    for name in names:
        if (folder / name).is_file():
            found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()
