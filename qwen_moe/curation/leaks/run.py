"""Copies a corpus without its leaks, in several processes. A run that is stopped anywhere goes on with the same output.

The output consists of shards: the rows that are kept, and those that are dropped, of about `--shard-size` of input. When
both files of a shard are in place, `progress/` says so and where the next shard begins. `decontaminated.json` is written
last.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from launchers.folder.atomic import replaced, write_json
from qwen_moe.alone import alone
from qwen_moe.curation.leaks.record import how, read_record, write_record
from qwen_moe.curation.leaks.rows import find_rows
from qwen_moe.curation.leaks.sequences import Sequences, read_sequences
from qwen_moe.curation.leaks.settings import LeakSettings
from qwen_moe.curation.leaks.tokens import tokens_of
from qwen_moe.curation.leaks.work import Given, Outcome, batches, examine, start_worker
from qwen_moe.data.encode import check_workers, in_order
from qwen_moe.data.output import Watch, status_lines
from qwen_moe.data.packed import check_unpackers
from qwen_moe.data.sources import DROPPED, RECORD, Corpus, Tally
from qwen_moe.errors import UserError
from qwen_moe.progress import style

PROGRESS = "progress"
_SMALL = 4_000_000  # bytes that are checked sooner than other processes have started


@dataclass(frozen=True, kw_only=True)
class Request:
    """``shard_bytes``: the input of a shard, before it is packed."""

    inputs: tuple[str, ...]
    settings: LeakSettings
    shard_bytes: int = 256_000_000

    def digest(self, corpus: Corpus, sequences: Sequences) -> str:
        """A hash of everything that decides the output. Whether bad rows end the command is not part of it, so a command
        that ended at one goes on where they are left out."""
        digest = hashlib.sha256(b"".join(status_lines(corpus.sources)))
        places = [(one.file, one.line, one.hash) for one in sequences.found]
        digest.update(repr((how(self.settings), self.settings.text_key, self.shard_bytes, places)).encode())
        return digest.hexdigest()


def decontaminate(
    request: Request, output: Path, *, workers: int = 0, overwrite: bool = False
) -> tuple[dict[str, Any], bool]:
    """Copy the rows of ``request.inputs`` that are no leaks to ``output``. Returns (the record, whether anything was done).

    The output does not depend on ``workers`` (0: one per core). Running it again does nothing; an output of another request
    is refused unless ``overwrite``. Raises UserError.
    """
    given, workers = workers, check_workers(workers)
    _check_output(request.inputs, output)
    sequences = read_sequences(request.settings, tokens_of(request.settings.tokenizer))
    _say_left_out(sequences)
    corpus = find_rows(request.inputs)
    check_unpackers(source.path for source in corpus.sources)
    if not given and corpus.bytes < _SMALL:
        workers = 1
    watch, digest = Watch(corpus.sources), request.digest(corpus, sequences)
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone(output):
        if (existing := _settled(output, digest, overwrite)) is not None:
            return existing, False
        print(f"reading {corpus}", file=sys.stderr)
        _copy(request, corpus, sequences, output, digest, workers)
        watch.check()
        return _finish(request, sequences, output, digest), True


def _say_left_out(sequences: Sequences) -> None:
    for tally in (sequences.short, sequences.bad):
        if tally.counts:
            print(f"tests left out: {tally}", file=sys.stderr)


def _check_output(inputs: tuple[str, ...], output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder")
    for name in inputs:
        if Path(name).is_dir() and output.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(
                f"--output {output} is in the input {name}, and would be read as input: give another folder"
            )


def _settled(output: Path, digest: str, overwrite: bool) -> dict[str, Any] | None:
    """The record of an output that is finished and fits the request; None if it must be made, or gone on with. Raises
    UserError for an output of another request."""
    started = sorted((output / PROGRESS).glob("*.json"))
    try:
        record = read_record(output)
        begun = record["request"] if record else _read(started[0])["request"] if started else None
    except UserError:
        if not overwrite:
            raise
        record, begun = None, ""
    if record and begun == digest and all((output / name).is_file() for name in record["files"]):
        shutil.rmtree(output / PROGRESS, ignore_errors=True)
        return record
    if begun is None and output.is_dir() and any(not _unfinished(path) for path in output.iterdir()):
        raise UserError(f"--output {output} has other files: give a new or empty folder")
    if begun not in (None, digest) and not overwrite:
        raise UserError(f"{output} was made from other inputs, tests or settings: use --overwrite, or another --output")
    if record or begun != digest:
        _clear(output)
    for folder in (output, output / DROPPED):
        for path in folder.glob(".*.jsonl.*"):  # of a process that was killed while it wrote
            path.unlink()
    return None


def _unfinished(path: Path) -> bool:
    """Whether a process that was killed in its first shard may have left this."""
    return path.name in (PROGRESS, DROPPED) or path.name.startswith((".clean-", "clean-"))


def _clear(output: Path) -> None:
    """Remove an output of another request."""
    (output / RECORD).unlink(missing_ok=True)
    for path in output.glob("clean-*.jsonl"):
        path.unlink()
    for name in (DROPPED, PROGRESS):
        shutil.rmtree(output / name, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert {"request", "end", "counts", "files", "best", "matched"} <= values.keys()
    except (ValueError, AssertionError, AttributeError):
        raise UserError(f"{path} is damaged: make the output again with --overwrite") from None
    return values


def _copy(request: Request, corpus: Corpus, sequences: Sequences, output: Path, digest: str, workers: int) -> None:
    """Write the shards that are missing."""
    done = [_read(path) for path in sorted((output / PROGRESS).glob("*.json"))]
    end = tuple(done[-1]["end"]) if done else (0, 0)
    if end[0] >= len(corpus.sources):
        return
    found = batches(corpus.sources, (end[0], end[1]), request.settings)
    given = Given(request.settings, sequences)
    bar = tqdm(unit="B", unit_scale=True, desc="check", **style())
    outcomes = in_order(examine, found, workers, start_worker, given)
    with bar:
        number = len(done)
        for first in outcomes:
            name = f"{number:05d}"
            record = _write_shard(first, outcomes, output, name, request.shard_bytes, bar)
            write_json(output / PROGRESS / f"{name}.json", {"request": digest} | record)
            number += 1


def _write_shard(
    first: Outcome, outcomes: Iterator[Outcome], output: Path, name: str, shard_bytes: int, bar: "tqdm[Any]"
) -> dict[str, Any]:
    """Write one shard. Returns what is known about it."""
    counts: Counter[str] = Counter(rows=0, kept=0, dropped=0, bad=0, by_chance=0)
    best: Counter[int] = Counter()
    matched: Counter[int] = Counter()
    bad = Tally()
    names = (f"clean-{name}.jsonl", f"{DROPPED}/dropped-{name}.jsonl")
    with _hashed(output / names[0]) as kept, _hashed(output / names[1]) as dropped:
        size, outcome = 0, first
        while True:
            kept.write(outcome.kept)
            dropped.write(outcome.dropped)
            size += outcome.size
            bar.update(outcome.size)
            counts["rows"] += outcome.rows
            counts["dropped"] += len(outcome.best)
            counts["bad"] += len(outcome.bad)
            counts["by_chance"] += outcome.by_chance
            best.update(outcome.best)
            matched.update(outcome.matched)
            for where in outcome.bad:
                bad.add("rows that cannot be read", where)
            if size >= shard_bytes or (following := next(outcomes, None)) is None:
                break
            outcome = following
    counts["kept"] = counts["rows"] - counts["dropped"] - counts["bad"]
    return {
        "end": outcome.end,
        "counts": dict(counts),
        "files": {names[0]: kept.digest.hexdigest(), names[1]: dropped.digest.hexdigest()},
        "best": {str(test): count for test, count in sorted(best.items())},
        "matched": {str(test): count for test, count in sorted(matched.items())},
        "bad": str(bad),
    }


class _Hashed:
    """A file whose SHA-256 is computed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self.digest.update(content)


@contextlib.contextmanager
def _hashed(path: Path) -> Iterator[_Hashed]:
    with replaced(path) as file:
        yield _Hashed(file)


def _finish(request: Request, sequences: Sequences, output: Path, digest: str) -> dict[str, Any]:
    """Write the record of all shards."""
    shards = [_read(path) for path in sorted((output / PROGRESS).glob("*.json"))]
    if not shards:
        raise UserError(f"there is no row in {', '.join(request.inputs)}: give other --input")
    counts: Counter[str] = Counter()
    best: Counter[str] = Counter()
    matched: Counter[str] = Counter()
    files: dict[str, str] = {}
    for shard in shards:
        counts.update(shard["counts"])
        best.update(shard["best"])
        matched.update(shard["matched"])
        files |= shard["files"]
    tests = {
        name: {"sequences": count, "leaked_sequences": 0, "documents": 0} for name, count in sequences.files.items()
    }
    for number, one in enumerate(sequences.found):
        tests[one.file]["leaked_sequences"] += str(number) in matched
        tests[one.file]["documents"] += best[str(number)]
    facts = {
        "counts": dict(counts),
        "files": files,
        "bad": [one["bad"] for one in shards if one["bad"]],
        "tests": tests,
    }
    record = write_record(output, request.settings, sequences, request=digest, facts=facts)
    shutil.rmtree(output / PROGRESS)
    return record
