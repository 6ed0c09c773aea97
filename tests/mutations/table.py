"""The table of mistakes, `table.yaml`: what is changed where, which tests must then fail, and who made such a mistake."""

from dataclasses import dataclass
from pathlib import Path

import yaml

TABLE = Path(__file__).with_name("table.yaml")


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One mistake. ``old`` occurs once in ``file`` (relative to the project's folder) and becomes ``new``; at least one of
    ``tests`` (pytest's node ids) must then fail. ``why``: a public bug, or how a maintainer could make this one."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def planted(self, root: Path) -> str:
        """The text of the file with the mistake. Raises ValueError unless ``old`` is there exactly once."""
        text = (root / self.file).read_text(encoding="utf-8")
        if (times := text.count(self.old)) != 1:
            raise ValueError(
                f"mutation {self.name!r}: its old text occurs {times} times in {self.file}, expected once: bring "
                f"{TABLE.name} up to date with the file"
            )
        return text.replace(self.old, self.new)


def load(path: Path = TABLE) -> list[Mutation]:
    """All mutations of the table. Raises ValueError for names that occur twice."""
    found = [
        Mutation(**row | {"tests": tuple(row["tests"])}) for row in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"mutations have the same name: {', '.join(twice)}; each needs its own")
    return found
