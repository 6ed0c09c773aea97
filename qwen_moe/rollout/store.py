"""A folder of rollouts: queries with their sampled answers and rewards, in files of a fixed number of queries.

===========================  ====================================================================================
``manifest.json``            settings, and at the end the summary and a SHA-256 of every file
``rollouts-00000.jsonl``     a line for each query: ``number``, ``id``, ``values``, ``prompt_tokens`` and ``samples``
``unscored-00000.jsonl``     the same without rewards: sampled, and not yet scored
``variances.jsonl``          the mean and variance of each query's rewards (`qwen_moe.rollout.summary`)
``tokenizer/``               the tokenizer whose ids these are
===========================  ====================================================================================

Each of ``samples`` has ``tokens`` (ids as they were sampled, the end token included), ``log_probs``, ``text``,
``finish_reason``, ``reward``, ``parts`` (each reward before its weight), ``why`` and ``failed``. Files appear whole. What is
sampled together is one file's, so a command that goes on after a kill writes the same bytes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json, write_text
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError

MANIFEST, VARIANCES, TOKENIZER = "manifest.json", "variances.jsonl", "tokenizer"
FORMAT = 1
_OF_SAMPLES = {"tokens", "log_probs", "text", "finish_reason"}
_OF_REWARDS = ("reward", "parts", "why", "failed")

Row = dict[str, Any]


class Store:
    """The writer of a folder. ``sampling``: what decides the samples. ``reward``: what decides their scores.

    Raises UserError if the folder holds something else, or was begun with other ``sampling``. If only ``reward`` differs,
    the samples are kept and scored anew.
    """

    def __init__(
        self, folder: Path, sampling: Mapping[str, Any], reward: Mapping[str, Any], queries: int, per_file: int
    ) -> None:
        self.folder, self._files = folder, -(-queries // per_file)
        values = {"format": FORMAT, "sampling": dict(sampling), "reward": dict(reward)}
        values |= {"queries": queries, "queries_per_file": per_file}
        self._values: dict[str, Any] = json.loads(json.dumps(values))
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            self._go_on(read_manifest(folder))
        elif others := sorted(path.name for path in folder.iterdir() if path.name != TOKENIZER):
            raise UserError(f"--output {folder} holds {others[0]} and no rollouts: give another folder")
        else:
            write_json(folder / MANIFEST, self._values)

    def _go_on(self, before: dict[str, Any]) -> None:
        then, now = ({**one, **one["sampling"]} for one in (before, self._values))
        names = [*{**before["sampling"], **self._values["sampling"]}, "queries", "queries_per_file", "format"]
        changed = [
            f"{name} {then.get(name)} is now {now.get(name)}" for name in names if then.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(
                f"{self.folder} was sampled with other settings ({'; '.join(changed)}): repeat the command with the former "
                "to go on, or give another --output"
            )
        check_hashes(self.folder, before, missing_too=False)
        if before["reward"] != self._values["reward"]:
            for index in range(self._files):
                if self._path("rollouts", index).exists():
                    rows = [_without_rewards(row) for row in self._read("rollouts", index)]
                    self._write("unscored", index, rows)
                    self._path("rollouts", index).unlink()
        if any(before.get(name) != value for name, value in self._values.items()):
            (self.folder / VARIANCES).unlink(missing_ok=True)
            write_json(self.folder / MANIFEST, self._values)

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:05d}.jsonl"

    def _write(self, kind: str, index: int, rows: Sequence[Row]) -> None:
        write_text(self._path(kind, index), "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self, kind: str, index: int) -> list[Row]:
        return list(_rows(self._path(kind, index)))

    def numbers(self, index: int) -> range:
        """The queries of a file."""
        size = self._values["queries_per_file"]
        return range(index * size, min((index + 1) * size, self._values["queries"]))

    def to_sample(self) -> list[int]:
        """Files whose queries have no samples yet."""
        kinds = ("rollouts", "unscored")
        return [i for i in range(self._files) if not any(self._path(kind, i).exists() for kind in kinds)]

    def to_score(self) -> list[int]:
        """Files whose samples have no scores yet."""
        return [
            i
            for i in range(self._files)
            if self._path("unscored", i).exists() and not self._path("rollouts", i).exists()
        ]

    def add_samples(self, index: int, rows: Sequence[Row]) -> None:
        """Keep the samples of a file's queries. They are on the disk when this returns."""
        self._write("unscored", index, rows)

    def samples(self, index: int) -> list[Row]:
        return self._read("unscored", index)

    def add_scores(self, index: int, rows: Sequence[Row]) -> None:
        """Keep rows whose samples have their rewards."""
        self._write("rollouts", index, rows)
        self._path("unscored", index).unlink(missing_ok=True)

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of the queries."""
        for index in range(self._files):
            yield from _rows(self._path("rollouts", index))

    def finish(self, summary: Mapping[str, Any], variances: Sequence[Row]) -> None:
        """Write the variances, and the manifest that says that all is there."""
        for index in range(self._files):
            self._path("unscored", index).unlink(missing_ok=True)  # of a kill between a file and its scores
        write_text(self.folder / VARIANCES, "".join(json.dumps(row) + "\n" for row in variances))
        names = [*(self._path("rollouts", index).name for index in range(self._files)), VARIANCES]
        names += [f"{TOKENIZER}/{path.name}" for path in sorted((self.folder / TOKENIZER).glob("*"))]
        files = {name: _sha256(self.folder / name) for name in names}
        write_json(self.folder / MANIFEST, self._values | {"summary": dict(summary), "files": files})


def _without_rewards(row: Row) -> Row:
    samples = [{name: value for name, value in one.items() if name not in _OF_REWARDS} for one in row["samples"]]
    return row | {"samples": samples}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def check_hashes(folder: Path, manifest: Mapping[str, Any], missing_too: bool = True) -> None:
    """Raise UserError for a file that is not as it was when the folder was finished."""
    for name, expected in manifest.get("files", {}).items():
        found = _sha256(folder / name)
        if found != expected and (found or missing_too):
            what = "is damaged (its SHA-256 is not that of manifest.json)" if found else "is missing"
            raise UserError(
                f"{folder / name} {what}: remove it and run the same `qwen-moe rollout` again, which makes only what is "
                "missing"
            )


def _rows(path: Path) -> Iterator[Row]:
    """The rows of a file. Raises UserError for a line that is not one."""
    for number, line in enumerate(read_text(path, "rollouts", "a folder of `qwen-moe rollout`").splitlines(), 1):
        where = f"{path}, line {number}"
        row = json_object(line, where)
        if not _is_row(row):
            raise UserError(f"{where} is not a query with its samples: remove the file, and it is made again")
        yield row


def _is_row(row: Row) -> bool:
    samples = row.get("samples")
    whole = isinstance(samples, list) and all(isinstance(one, dict) and one.keys() >= _OF_SAMPLES for one in samples)
    return whole and isinstance(row.get("prompt_tokens"), list) and row.keys() >= {"number", "id", "values"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of rollouts. Raises UserError if it is none."""
    values = json_object(
        read_text(folder / MANIFEST, "the manifest", "a folder that `qwen-moe rollout` wrote"), str(folder / MANIFEST)
    )
    sections = isinstance(values.get("sampling"), dict) and isinstance(values.get("reward"), dict)
    if values.get("format") != FORMAT or not sections or not isinstance(values.get("files", {}), dict):
        raise UserError(f"{folder / MANIFEST} is not a manifest of rollouts, format {FORMAT}: give another folder")
    return values


def read_rollouts(folder: Path) -> tuple[dict[str, Any], Iterator[Row]]:
    """The manifest and the rows of a finished folder, in the order of the queries. Raises UserError if it is not finished,
    or if a file was changed since."""
    manifest = read_manifest(folder)
    if "files" not in manifest:
        raise UserError(f"{folder} is not finished: run the same `qwen-moe rollout` again, which goes on")
    check_hashes(folder, manifest)
    names = [name for name in manifest["files"] if name.startswith("rollouts-")]
    return manifest, (row for name in names for row in _rows(folder / name))
