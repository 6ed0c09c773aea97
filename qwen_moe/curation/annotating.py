"""Steps that ask another package of curation about each document: scores, domains, leaks of tests. Their sections of a
recipe are settings of those packages."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen_moe.curation.documents import Lines, Shard
from qwen_moe.curation.execute import Stage
from qwen_moe.curation.filters import MinimumScore
from qwen_moe.curation.step import Context, Step, named

_SMALL = 1 << 20  # bytes of a file of a folder whose content is hashed


class Annotating(Step):
    """A step of a datatrove pipeline, ``classes``: that of its settings and its own."""

    @abstractmethod
    def classes(self) -> tuple[Any, Any]: ...

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

    def given(self, at: Context) -> Any:
        """The settings of the recipe as the other package's own. Raises UserError."""
        from pydantic import ValidationError

        from qwen_moe.config.load import explain

        cls, _ = self.classes()
        try:
            return cls(**self.section(at).settings)
        except ValidationError as error:
            raise explain(error, at.source, (self.name,), whole=cls) from None

    def made(self, at: Context, *arguments: Any) -> Any:
        """The step of the library's pipeline. Raises UserError."""
        return self.classes()[1](self.given(at), *arguments)

    def pipeline(self, at: Context) -> list[Any]:
        return [self.made(at)]

    def stages(self, at: Context) -> Iterator[Stage]:
        folder = at.folder(self.name)
        pipeline = [Shard(at.before(self.name)), *self.pipeline(at), Lines(folder)]
        yield Stage(self.name, pipeline, at.config.tasks, folder, self.section(at).workers)


class Scores(Annotating):
    name, what = "scores", "score the documents"

    def classes(self) -> tuple[Any, Any]:
        from qwen_moe.curation.scores.settings import ScoreSettings
        from qwen_moe.curation.scores.step import ScoreStep

        return ScoreSettings, ScoreStep

    def pipeline(self, at: Context) -> list[Any]:
        minimum = self.section(at).minimum
        drop = [MinimumScore(minimum, Lines(at.folder(self.name), filter="minimum_score"))] if minimum else []
        return [self.made(at), *drop]


class Domains(Annotating):
    name, what = "domains", "classify the documents by domain"

    def classes(self) -> tuple[Any, Any]:
        from qwen_moe.curation.scores.domains import DomainStep
        from qwen_moe.curation.scores.settings import DomainSettings

        return DomainSettings, DomainStep


class Decontamination(Annotating):
    name, what = "decontamination", "drop documents that leak tests"

    def classes(self) -> tuple[Any, Any]:
        from qwen_moe.curation.leaks.filter import LeakFilter
        from qwen_moe.curation.leaks.settings import LeakSettings

        return LeakSettings, LeakFilter

    def pipeline(self, at: Context) -> list[Any]:
        return [self.made(at, Lines(at.folder(self.name), filter="leaks"))]

    def record(self, at: Context, folders: Iterable[Path]) -> None:
        """Write beside the documents of ``folders`` which tests they were checked against, as `data decontaminate` does, so
        that token files and an evaluation know it."""
        from qwen_moe.curation.leaks.record import write_record
        from qwen_moe.curation.leaks.sequences import read_sequences
        from qwen_moe.curation.leaks.tokens import tokens_of

        settings = self.given(at)
        tests = read_sequences(settings, tokens_of(settings.tokenizer))
        for folder in folders:
            files = {}
            for path in sorted(folder.glob("*.jsonl")):
                with path.open("rb") as file:
                    files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            facts = {"counts": {}, "files": files, "bad": [], "tests": {}}
            write_record(folder, settings, tests, request="", facts=facts)


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
