"""Planted leaks of tests: how many are found, what else is removed, and how fast, beside tokenizing the same text.

    python benchmarks/decontaminate.py [--documents 100000] [--tests 10000] [--workers 2] [--sample 40] [--slow 300]
    python benchmarks/decontaminate.py --rule close

Text: prose of pydoc's topics and of the docstrings of the standard library and of installed packages, by paragraphs. Tests
are paragraphs of 16 to 200 words from one half of the packages. Documents are made of 3 to 14 paragraphs of the other half,
which share no eight words in a row with a test, so a document without a planted leak is clean. (Within a package, docstrings
of sister functions are copies of each other with a few words changed, which the rule rightly finds: `same_package` counts
how many documents of such paragraphs are removed.) One in 50 documents gets a leak: a test as it is, with 5, 10, 20 or 30%
of the words replaced by others of the corpus, or in capitals with other spaces and punctuation. Seconds are of processors,
all processes together, because other work may share the machine; wall time is reported too.
"""

import argparse
import ast
import contextlib
import itertools
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from qwen_moe.curation.leaks.edits import least_edits
from qwen_moe.curation.leaks.finder import windows
from qwen_moe.curation.leaks.lcs import common, masks_of
from qwen_moe.curation.leaks.settings import least_common, most_edits
from qwen_moe.data.words import words

KINDS = ("verbatim", "5%", "10%", "20%", "case and spaces", "30%")
EVERY = 50  # documents for each planted leak
MOST = 40_000  # paragraphs
RUN = 8  # words in a row that clean text shares with no test


Paragraph = tuple[str, str]  # the package, and the text


def paragraphs(cache: Path | None) -> list[Paragraph]:
    """Paragraphs of prose, each once, in an order that does not change. ``cache``: a file that keeps them, because reading
    all those modules takes minutes."""
    from pydoc_data.topics import topics

    if cache is not None and cache.is_file():
        return [(package, text) for package, text in json.loads(cache.read_text())]
    found: dict[str, Paragraph] = {}
    texts: Iterator[Paragraph] = (("pydoc", text) for text in topics.values())
    for package, text in itertools.chain(texts, _docstrings()):
        for paragraph in re.split(r"\n\s*\n", text):
            if is_prose(paragraph):
                found.setdefault(" ".join(words(paragraph)), (package, paragraph.strip()))
        if len(found) >= MOST:
            break
    result = [found[key] for key in sorted(found)]
    random.Random(0).shuffle(result)
    if cache is not None:
        cache.write_text(json.dumps(result))
    return result


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph has at least 16 words and is sentences, not code, a list of parameters or a table."""
    if (
        len(paragraph) < 60
        or not paragraph.rstrip().endswith((".", "!", "?"))
        or re.search(r">>>|--|==| : ", paragraph)
    ):
        return False
    plain = [word for word in paragraph.split() if re.fullmatch(r"[A-Za-z'’-]+[.,;:!?)]*", word)]
    return len(words(paragraph)) >= 16 and len(plain) >= 0.8 * len(paragraph.split())


def _docstrings() -> Iterator[Paragraph]:
    warnings.simplefilter("ignore")
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = {path: root for root in roots for path in sorted(root.rglob("*.py"))}
    for path, root in files.items():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue
        parts = [part for part in path.relative_to(root).parts if part not in ("site-packages", "dist-packages")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield parts[0], ast.get_docstring(node) or ""


def halves(every: list[Paragraph]) -> tuple[list[str], list[str]]:
    """The paragraphs of two halves of the packages."""
    sizes = Counter(package for package, _ in every)
    sides: tuple[set[str], set[str]] = (set(), set())
    for package, _ in sorted(sizes.items(), key=lambda one: (-one[1], one[0])):
        min(sides, key=lambda side: sum(sizes[name] for name in side)).add(package)
    first, second = ([text for package, text in every if package in side] for side in sides)
    return first, second


def _runs(text: str) -> set[int]:
    found = words(text)
    return {hash(tuple(found[n : n + RUN])) for n in range(len(found) - RUN + 1)}


def planted(test: str, kind: str, rng: random.Random, vocabulary: list[str]) -> str:
    """A copy of a test."""
    copy = test.split()
    if kind == "case and spaces":
        return "".join(word.upper() + rng.choice((" ", "  ", "\n", ", ", "\t-- ")) for word in copy)
    share = 0.0 if kind == "verbatim" else int(kind.rstrip("%")) / 100
    copy = words(test) if share else copy
    for place in rng.sample(range(len(copy)), int(share * len(copy))):
        copy[place] = rng.choice(vocabulary)
    return " ".join(copy)


def make(folder: Path, documents: int, tests: int, cache: Path | None) -> dict[str, str]:
    """Write the corpus and the tests. Returns the kind of each planted leak by the id of its document."""
    rng = random.Random(1)
    here, there = halves(paragraphs(cache))
    short = [text for text in here if len(words(text)) <= 200]
    chosen = short[:tests]
    held = set().union(*map(_runs, chosen))
    pool = [text for text in there if held.isdisjoint(_runs(text))]
    sisters = [text for text in here[len(here) // 2 :] if text not in set(chosen) and held.isdisjoint(_runs(text))]
    vocabulary = [word for text in pool[:5000] for word in words(text)]
    print(
        f"{len(chosen):,} tests, {len(pool):,} paragraphs of other packages, {len(sisters):,} of the same ones",
        file=sys.stderr,
    )
    _write_documents(folder / "sisters.jsonl", sisters, min(1000, documents), rng)
    with (folder / "tests.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in chosen)
    print(f"{sum(len(words(text)) for text in chosen) / len(chosen):.0f} words a test", file=sys.stderr)
    kinds: dict[str, str] = {}
    with (folder / "docs.jsonl").open("w") as file:
        for number in range(documents):
            parts = [rng.choice(pool) for _ in range(rng.randint(3, 14))]
            if number % EVERY == 0:
                kinds[str(number)] = kind = KINDS[number // EVERY % len(KINDS)]
                parts.insert(rng.randint(0, len(parts)), planted(rng.choice(chosen), kind, rng, vocabulary))
            file.write(json.dumps({"text": "\n\n".join(parts), "id": str(number)}) + "\n")
    return kinds


def _write_documents(path: Path, pool: list[str], documents: int, rng: random.Random) -> None:
    with path.open("w") as file:
        for _ in range(documents):
            parts = [rng.choice(pool) for _ in range(rng.randint(3, 14))]
            file.write(json.dumps({"text": "\n\n".join(parts)}) + "\n")


def measured(command: list[str]) -> dict[str, float]:
    """Run a command. Returns its seconds (wall, and of processors) and its peak memory, of all processes together."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, err = process.communicate()
    watcher.join()
    if process.returncode:
        raise RuntimeError(err.decode()[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - start, "cpu": cpu, "peak_gb": peak / 1e9}


def tokenize(source: str, tokenizer: str, workers: int) -> None:
    """What is compared with: the text to token ids, which are not written."""
    from qwen_moe.data.corpus import ReadCounts, read_documents
    from qwen_moe.data.encode import encoded
    from qwen_moe.data.sources import find_corpus

    (file,) = find_corpus([source]).sources
    tokens = sum(
        len(ids) for batch in encoded(Path(tokenizer), read_documents(file, ReadCounts()), workers) for ids in batch
    )
    print(f"{tokens:,} tokens")


def brute_force(tests: list[list[str]], document: list[str], rule: str) -> bool:
    """The rule over all tests and windows, without an index."""
    for test in tests:
        shorter, longer = sorted((test, document), key=len)
        masks = masks_of(shorter)  # type: ignore[arg-type]
        for start, end in windows(len(longer), len(shorter)):
            rows = [masks[word] for word in longer[start:end] if word in masks]  # type: ignore[index]
            if len(rows) < 13 or common(masks, len(shorter), rows) < least_common(len(shorter)):
                continue
            if rule == "windowed" or least_edits(masks, len(shorter), longer[start:end]) <= most_edits(len(shorter)):  # type: ignore[arg-type]
                return True
    return False


def command(folder: Path, output: str, *options: str, docs: str = "docs.jsonl") -> list[str]:
    base = [sys.executable, "-m", "qwen_moe", "data", "decontaminate", "--input", str(folder / docs)]
    return [*base, "--against", str(folder / "tests.jsonl"), "--output", str(folder / output), *options]


def dropped_ids(folder: Path) -> set[str]:
    files = sorted((folder / "dropped").glob("*.jsonl"))
    return {json.loads(line)["id"] for path in files for line in path.read_text().splitlines()}


def sampled(folder: Path, kinds: dict[str, str], found: set[str], count: int, rule: str) -> tuple[int, int]:
    """(documents, those that brute force judges otherwise), half of them with a planted leak."""
    tests = [words(json.loads(line)["text"]) for line in (folder / "tests.jsonl").read_text().splitlines()]
    lines = (folder / "docs.jsonl").read_text().splitlines()
    rng = random.Random(3)
    chosen = rng.sample(sorted(kinds), min(len(kinds), count // 2))
    chosen += [str(number) for number in rng.sample(range(len(lines)), count - len(chosen))]
    texts = {n: words(json.loads(lines[int(n)])["text"]) for n in chosen}
    different = sum(brute_force(tests, texts[n], rule) != (n in found) for n in chosen)
    return len(chosen), different


def slow_ways(folder: Path, kinds: dict[str, str], count: int, workers: int) -> dict[str, Any]:
    """On some of the documents: what the literal rule removes, and what the complete index finds that 3-grams do not."""
    small = folder / "small"
    small.mkdir()
    lines = (folder / "docs.jsonl").read_text().splitlines()[:count] + (
        folder / "sisters.jsonl"
    ).read_text().splitlines()[:count]
    rows = [json.loads(line) | {"id": str(n) if n < count else f"sister {n}"} for n, line in enumerate(lines)]
    (small / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (small / "tests.jsonl").write_text((folder / "tests.jsonl").read_text())
    megabytes = sum(len(row["text"]) for row in rows) / 1e6
    result: dict[str, Any] = {}
    found = {}
    for name, options in (("3-grams", []), ("complete", ["--complete"]), ("literal", ["--rule", "report"])):
        result[name] = measured(command(small, name, "--workers", str(workers), *options))
        result[name]["mb_per_cpu_second"] = megabytes / result[name]["cpu"]
        found[name] = dropped_ids(small / name)
    clean = {str(n) for n in range(count)} - kinds.keys()
    result["literal"] |= {"clean": len(clean), "clean_removed": len(found["literal"] & clean)}
    lost = found["complete"] - found["3-grams"]
    result["3-grams"] |= {
        "documents": len(rows),
        "found": len(found["3-grams"]),
        "lost": Counter(kinds.get(n, "same package" if n.startswith("sister") else "clean") for n in sorted(lost)),
    }
    assert found["3-grams"] <= found["complete"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--tests", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sample", type=int, default=40, help="documents that brute force judges, too")
    parser.add_argument(
        "--slow", type=int, default=300, help="documents that the literal rule and --complete judge, too"
    )
    parser.add_argument("--rule", choices=("windowed", "close"), default="windowed")
    parser.add_argument("--cache", type=Path, help="a file that keeps the paragraphs for the next time")
    parser.add_argument("--tokenize", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokenize:
        source, tokenizer = args.tokenize
        tokenize(source, tokenizer, args.workers)
        return
    from qwen_moe.data.tokenizer import train_tokenizer

    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = make(folder, args.documents, args.tests, args.cache)
        lines = (folder / "docs.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines[:: max(1, len(lines) // 3000)]]
        train_tokenizer(texts, 16_000, folder / "tokenizer")
        megabytes = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
        ours = measured(command(folder, "out", "--workers", str(args.workers), "--rule", args.rule))
        given = [str(folder / "docs.jsonl"), str(folder / "tokenizer"), "--workers", str(args.workers)]
        theirs = measured([sys.executable, __file__, "--tokenize", *given])
        measured(command(folder, "out-sisters", "--rule", args.rule, docs="sisters.jsonl"))
        sisters = json.loads((folder / "out-sisters" / "leaks.json").read_text())["counts"]
        found = dropped_ids(folder / "out")
        clean = {str(n) for n in range(len(lines))} - kinds.keys()
        judged, different = sampled(folder, kinds, found, args.sample, args.rule)
        result: dict[str, Any] = {
            "machine": platform.processor() or platform.machine(),
            "load": os.getloadavg()[0],
            "rule": args.rule,
            "documents": args.documents,
            "tests": args.tests,
            "megabytes": megabytes,
            "found": {
                kind: [sum(n in found for n in of), len(of)]
                for kind in KINDS
                if (of := [n for n, its in kinds.items() if its == kind])
            },
            "clean": len(clean),
            "clean_removed": len(clean & found),
            "same_package": {"documents": sisters["rows"], "removed": sisters["dropped"]},
            "judged_by_brute_force": judged,
            "judged_otherwise": different,
            "decontaminate": ours | {"mb_per_cpu_second": megabytes / ours["cpu"]},
            "tokenize": theirs | {"mb_per_cpu_second": megabytes / theirs["cpu"]},
        }
        if args.slow:
            result["slow_ways"] = slow_ways(folder, kinds, args.slow, args.workers)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
