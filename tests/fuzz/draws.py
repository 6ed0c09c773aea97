"""One draw of the fuzz: damage a copy of the world, run a command on it, judge the answer.

`python -m tests.fuzz.draws 'JSON OF A DRAW'` repeats one and shows all that was said.
"""

import json
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.damage import NEVER_A_VALUE, Damage, damage_file
from tests.fuzz.server import HEAVY, Answer, Server
from tests.fuzz.targets import READERS, TARGETS, Reader, Target, not_finite
from tests.fuzz.world import World, build

SLOW_SECONDS = 15.0  # beside others on two cores; the command itself takes two at most
_SIGNS = ("Traceback (most recent call last)", "Fatal Python error", "panicked at", "terminate called")


@dataclass(frozen=True)
class Draw:
    """``file`` counts the target's paths that the reader needs."""

    target: str
    reader: str
    file: int
    damage: Damage

    def repeat(self) -> str:
        return f"python -m tests.fuzz.draws '{json.dumps(asdict(self))}'"


@dataclass
class Fuzz:
    """A world and the results of its undamaged commands."""

    world: World
    scratch: Path
    known: dict[str, Any] = field(default_factory=dict)
    last: Answer = field(default_factory=lambda: Answer(0, "", "", 0, False, 0))

    def copy(self, needs: tuple[str, ...]) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.scratch)) / "world"
        folder.mkdir()
        for name in (*needs, "bin"):
            source = self.world.root / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, folder / name)
        return folder

    def call(self, reader: Reader, folder: Path, seconds: float = SLOW_SECONDS) -> Answer:
        return self.world.server.run(reader.argv, folder, seconds, **World.environment(folder))

    def undamaged(self, name: str) -> Any:
        if name not in self.known:
            reader = READERS[name]
            folder = self.copy(reader.needs)
            answer = self.call(reader, folder, 60)
            assert answer.code == (2 if reader.refuses else 0), f"{name}: {answer.out}\n{answer.err}"
            self.known[name] = None if reader.refuses else reader.result(answer, folder)
            shutil.rmtree(folder.parent)
        return self.known[name]

    def judge(self, draw: Draw, show: bool = False) -> str | None:
        """None when the answer was a right one, else what was wrong with it."""
        reader, target = READERS[draw.reader], TARGETS[draw.target]
        folder = self.copy(reader.needs)
        try:
            path = self._path(draw, folder)
            if path is None:
                return None
            before = path.read_bytes()
            kind = damage_file(path, target.form, draw.damage)
            if path.is_file() and path.read_bytes() == before:
                return None
            answer = self.last = self.call(reader, folder)
            if show:
                print(
                    f"{kind} of {path}\nexit code {answer.code} after {answer.seconds:.1f} s\n{answer.out}\n{answer.err}"
                )
            wrong = wrong_answer(answer)
            if wrong or answer.code or reader.refuses or _told(answer.err, path):
                return wrong
            if draw.reader in target.hashed:
                return f"{kind} was not noticed"
            return _wrong_result(reader, target, kind, self.undamaged(draw.reader), answer, folder)
        finally:
            shutil.rmtree(folder.parent)

    def _path(self, draw: Draw, folder: Path) -> Path | None:
        """The file to damage: one that the reader needs; of a folder one of its files."""
        found = []
        for name in TARGETS[draw.target].paths:
            path = folder / name
            found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found = [path for path in found if path.is_file()]
        return found[draw.file % len(found)] if found else None


def wrong_answer(answer: Answer) -> str | None:
    """What is wrong with how a command ended, whatever it was to say."""
    said, err = answer.out + answer.err, answer.err.replace("\r", "\n")  # a progress bar stands before the message
    last = [line for line in err.splitlines() if line.strip()][-1:] or [""]
    if answer.timed_out:
        return f"no answer after {answer.seconds:.0f} s"
    if answer.code < 0:
        return f"ended by signal {-answer.code}: {last[0][:200]}"
    for sign in _SIGNS:
        if sign in said:
            return f"traceback: {_cause(said)}"
    if answer.code not in (0, 1, 2):
        return f"exit code {answer.code}: {last[0][:200]}"
    if answer.code and not said.strip():
        return "failed without a word"
    if answer.code == 2 and len(re.findall(r"^(?:error|qwen-moe[^:\n]*: error): ", err, re.MULTILINE)) != 1:
        return f"not one message: {err.strip()[-300:]}"
    if answer.code == 1:
        return f"exit code 1: {last[0][:200]}"
    return None


def _told(err: str, path: Path) -> bool:
    """Whether the damage was named before the command went on without the file."""
    words = re.compile(r"damaged|ignored|warning|not used|left out|note:", re.IGNORECASE)
    names = (path.name, path.parent.name)
    return any(words.search(line) and any(name in line for name in names) for line in err.splitlines())


def _cause(said: str) -> str:
    """The last line of a traceback and where it was raised."""
    lines = said.splitlines()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit|Panic|Damaged)\b", line)]
    places = [line.strip() for line in lines if re.match(r"\s+File \"", line)]
    ours = [
        place for place in places if "site-packages" not in place and "tests/fuzz" not in place and "/lib/" not in place
    ]
    return f"{(errors or lines)[-1][:200]} at {(ours or places or [''])[-1]}"


def _wrong_result(reader: Reader, target: Target, kind: str, right: Any, answer: Answer, folder: Path) -> str | None:
    try:
        found = reader.result(answer, folder)
    except (ValueError, OSError) as error:
        return f"exit code 0 without its result: {error}"
    if found == right:
        return None
    if not_finite(found) and not not_finite(right):
        return f"a number that is none, exit code 0, after {kind}"
    if kind in target.allowed or (target.silent and kind not in NEVER_A_VALUE):
        return None
    return f"another result in silence after {kind}: {_difference(right, found)}"


def _difference(right: Any, found: Any) -> str:
    if isinstance(right, dict) and isinstance(found, dict):
        keys = [key for key in {**right, **found} if right.get(key) != found.get(key)]
        return "; ".join(f"{key}: {str(right.get(key))[:60]} -> {str(found.get(key))[:60]}" for key in keys[:3])
    return f"{str(right)[:150]} -> {str(found)[:150]}"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="qwen-moe-world-") as folder:
        server = Server(HEAVY)
        try:
            fuzz = Fuzz(build(Path(folder) / "world", server), Path(folder))
            for text in sys.argv[1:]:
                values = json.loads(text)
                if "verb" in values:
                    from tests.fuzz.options import OptionDraw, judge_options

                    wrong = judge_options(fuzz, OptionDraw(**values), show=True)
                else:
                    wrong = fuzz.judge(Draw(**values), show=True)
                print(f"verdict: {wrong or 'right'}")
        finally:
            server.close()


if __name__ == "__main__":
    main()
