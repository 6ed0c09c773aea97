"""The rows of the table in docs/damage.md, each with the draw that shows it; `python -m tests.fuzz.rows` prints it."""

from dataclasses import dataclass

from tests.fuzz.damage import Damage
from tests.fuzz.draws import Draw
from tests.fuzz.options import BASE, OptionDraw
from tests.fuzz.targets import READERS, TARGETS


@dataclass(frozen=True, kw_only=True)
class Row:
    """``says``: a regular expression that the answer's stderr (or stdout) holds. ``light``: needs no trained run."""

    file: str
    damage: str
    answer: str
    draw: Draw | OptionDraw
    code: int = 2
    says: str
    light: bool = False

    def line(self) -> str:
        if isinstance(self.draw, Draw):
            argv = READERS[self.draw.reader].argv
            command = " ".join(argv[: 2 if argv[0] in ("data", "convert", "scaling") else 1])
        else:
            command = " ".join(self.draw.verb)
        return f"| {self.file} | {self.damage} | {self.answer} | `{command}` |"


def _file(target: str, reader: str, damage: Damage, file: int = 0) -> Draw:
    assert reader in TARGETS[target].readers
    return Draw(target=target, reader=reader, file=file, damage=damage)


def _option(verb: str, *argv: str, instead: bool = False) -> OptionDraw:
    base = BASE[tuple(verb.split())][0]
    return OptionDraw(verb.split(), [*argv, *base[1:]] if instead else [*base, *argv], [])


ROWS: tuple[Row, ...] = ()


def table() -> str:
    lines = [row.line() for row in ROWS]
    return "\n".join(["| what | damage | what happens | seen by |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    print(table())
