"""Helpers of the tests of `data prepare`: a random corpus, the call, and hashes of the files that it writes."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from qwen_moe.data.manifest import PreparedData, bin_path, idx_path
from qwen_moe.data.prepare import Request
from qwen_moe.data.prepare import prepare as prepare_request


def prepare(
    inputs: list[str], prefix: Path, *, workers: int = 1, overwrite: bool = False, gone: bool = False, **request: Any
) -> tuple[PreparedData, bool]:
    asked = Request(inputs=tuple(inputs), **request)
    return prepare_request(asked, prefix, workers=workers, overwrite=overwrite, without_inputs=gone)


def write_corpus(folder: Path, count: int = 60, seed: int = 0) -> tuple[Path, list[str]]:
    rng = random.Random(seed)
    texts = [
        " ".join(rng.choices(["alpha", "beta", "gamma", "<|endoftext|>", "δέλτα"], k=rng.randint(1, 200)))
        for _ in range(count)
    ]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def contents(prefix: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (bin_path(prefix), idx_path(prefix))}
