"""Steps whose settings and work are of other modules of this package: scores, domains, leaks of tests."""

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen_moe.curation.documents import Lines, Shard
from qwen_moe.curation.execute import Stage
from qwen_moe.curation.filters import MinimumScore
from qwen_moe.curation.step import Context, Step, named
from qwen_moe.errors import UserError

_SMALL = 1 << 20  # bytes of a file of a folder whose content is hashed


class Foreign(Step):
    """A step of another module of this package: ``module`` has its class of settings, ``classes``: (settings, step)."""

    module: str
    classes: tuple[str, str]

    def section(self, at: Context) -> Any:
        found = getattr(at.config, self.name)
        assert found is not None
        return found

    def settings(self, at: Context) -> dict[str, Any]:
        found = named(self.name, self.section(at).model_dump(exclude={"workers"}, mode="json"))
        return found | {f"{name} (content)": digest for name, digest in _contents(found.values())}

    def check(self, at: Context) -> None:
        """Raise UserError for settings with which the step cannot run."""
        made = self.made(at)
        if hasattr(made, "check"):
            made.check()

    def _settings(self, at: Context) -> Any:
        from pydantic import ValidationError

        from qwen_moe.config.load import explain

        cls = self._class(0)
        try:
            return cls(**self.section(at).settings)
        except ValidationError as error:
            raise explain(error, at.source, (self.name,), whole=cls) from None

    def _class(self, which: int) -> Any:
        name = self.classes[which]
        package = self.module.rpartition(".")[0]
        for module in (self.module, f"{package}.settings"):
            try:
                found = getattr(importlib.import_module(f"qwen_moe.curation.{module}"), name, None)
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("qwen_moe.curation"):
                    raise
                found = None
            if found is not None:
                return found
        raise UserError(
            f"step {self.name}: this version has no {name} in qwen_moe.curation.{self.module}: leave the step out"
        )

    def made(self, at: Context, *arguments: Any) -> Any:
        """The step of the library's pipeline. Raises UserError."""
        return self._class(1)(self._settings(at), *arguments)

    def pipeline(self, at: Context) -> list[Any]:
        return [self.made(at)]

    def stages(self, at: Context) -> Iterator[Stage]:
        folder = at.folder(self.name)
        pipeline = [Shard(at.before(self.name)), *self.pipeline(at), Lines(folder)]
        yield Stage(self.name, pipeline, at.config.tasks, folder, self.section(at).workers)


class Scores(Foreign):
    name, what = "scores", "score the documents"
    module, classes = "scores.step", ("ScoreSettings", "ScoreStep")

    def pipeline(self, at: Context) -> list[Any]:
        minimum = self.section(at).minimum
        drop = [MinimumScore(minimum, Lines(at.folder(self.name), filter="minimum_score"))] if minimum else []
        return [self.made(at), *drop]


class Domains(Foreign):
    name, what = "domains", "classify the documents by domain"
    module, classes = "scores.domains", ("DomainSettings", "DomainStep")


class Decontamination(Foreign):
    name, what = "decontamination", "drop documents that leak tests"
    module, classes = "leaks.filter", ("LeakSettings", "LeakFilter")

    def pipeline(self, at: Context) -> list[Any]:
        return [self.made(at, Lines(at.folder(self.name), filter="leaks"))]

    def record(self, at: Context, folders: Iterable[Path]) -> None:
        """Write beside the documents of ``folders`` which tests they were checked against, as `data decontaminate` does, so
        that token files and an evaluation know it."""
        try:
            names = ("record", "sequences", "tokens")
            record, sequences, tokens = (importlib.import_module(f"qwen_moe.curation.leaks.{name}") for name in names)
        except ModuleNotFoundError:
            return
        settings = self._settings(at)
        tests = sequences.read_sequences(settings, tokens.tokens_of(settings.tokenizer))
        for folder in folders:
            files = {}
            for path in sorted(folder.glob("*.jsonl")):
                with path.open("rb") as file:
                    files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            facts = {"counts": {}, "files": files, "bad": [], "tests": {}}
            record.write_record(folder, settings, tests, request="", facts=facts)


def _contents(values: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Of each value that names a file or a folder, its path and a hash: of the names and sizes of the files in it, and of
    the content of those that are small or stand alone."""
    for value in values:
        names = value if isinstance(value, list) else [value]
        for path in (Path(name.removeprefix("classifier:")) for name in names if isinstance(name, str) and name):
            if not path.exists():
                continue
            files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
            digest = hashlib.sha256()
            for file in files:
                digest.update(f"{file.relative_to(path)}|{file.stat().st_size}".encode())
                if file == path or file.stat().st_size < _SMALL:
                    with file.open("rb") as opened:
                        digest.update(hashlib.file_digest(opened, "sha256").digest())
            yield str(path), digest.hexdigest()
