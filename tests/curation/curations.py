"""A small corpus with everything that a curation meets, and its recipe."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from qwen_moe.cli import main

WORDS = [
    "the",
    "model",
    "of",
    "a",
    "text",
    "and",
    "its",
    "words",
    "that",
    "have",
    "been",
    "read",
    "with",
    "care",
    "to",
    "find",
    "what",
    "is",
    "there",
    "for",
    "us",
    "in",
    "each",
    "line",
]


def sentences(seed: int, count: int) -> str:
    """Lines of English-like sentences, the same for the same seed."""
    rng = random.Random(seed)
    return "\n".join(
        " ".join(rng.choices(WORDS, k=12)).capitalize() + f" number{rng.randrange(10**6)}." for _ in range(count)
    )


def rows() -> list[dict[str, Any]]:
    """24 documents of prose, of which two are equal and two similar; one too short, one of symbols, one in German."""
    found: list[dict[str, Any]] = [{"text": sentences(seed, 12)} for seed in range(20)]
    found.append({"text": found[3]["text"], "id": "given", "source": "elsewhere"})
    found.append({"text": found[4]["text"].replace("number", "Number", 1) + " One more."})
    found.append({"text": "Short."})
    found.append({"text": "=-=-= ### " * 60})
    found.append({"text": "Der Hund und die Katze sind in dem Haus und das ist nicht für die Maus. " * 5})
    return found


def write_corpus(folder: Path) -> Path:
    """JSON lines of prose, Parquet of numbers in words, and text files."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    (folder / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    table = pyarrow.table({"content": [sentences(100 + seed, 8) for seed in range(12)], "stars": list(range(12))})
    pyarrow.parquet.write_table(table, folder / "stars.parquet")
    notes = folder / "notes"
    notes.mkdir()
    for number in range(6):
        (notes / f"{number}.md").write_text(sentences(200 + number, 10))
    return folder


def recipe(folder: Path, run: str = "run", **changes: Any) -> Path:
    """Write a recipe for the corpus of ``folder`` and return its path."""
    values: dict[str, Any] = {
        "run_dir": str(folder / run),
        "input": [
            {"path": str(folder / "corpus/prose.jsonl"), "domain": "prose"},
            {"path": str(folder / "corpus/stars.parquet"), "domain": "stars", "text_key": "content"},
            {"path": str(folder / "corpus/notes"), "domain": "notes"},
        ],
        "tasks": 3,
        "workers": 1,
        "filters": [{"length": {"min_characters": 50}}, "symbols", {"language": {"languages": ["en"]}}],
        "deduplication": {"exact": True, "minhash": {"num_buckets": 8, "hashes_per_bucket": 4}},
        "weights": {"targets": {"prose": 0.4, "notes": 0.4, "stars": 0.2}, "max_repeats": 8},
        "prepare": {"train_tokenizer": True, "vocab_size": 300},
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (values | changes).items() if value is not None}))
    return path


def curate(path: Path, *arguments: str) -> int:
    return main(["data", "curate", str(path), *arguments])


def outputs(run: Path) -> dict[str, bytes]:
    """The content of every file that documents, reasons and tokens are in."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        inside = [
            part
            for part in ("kept/", "dropped/", "tally/", "clusters.jsonl", "plan.json", "tokenizer/")
            if part in name
        ]
        if path.is_file() and "/log/" not in name and (inside or name.endswith((".bin", ".idx"))):
            found[name] = path.read_bytes()
    return found


def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.rglob("*.jsonl")) for line in path.read_text().splitlines()]
