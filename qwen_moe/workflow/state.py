"""What a pipeline has done: the inputs and results of each step, in one JSON file that is written atomically."""

import hashlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_json
from launchers.folder.run_folder import read_json
from launchers.local.supervisor import INTERRUPTED
from qwen_moe.errors import UserError
from qwen_moe.runs.identity import is_free

STATE = "state.json"
SHOWN = 6  # changed inputs in one message


@dataclass
class State:
    """``steps``: name -> {"inputs", "facts", "commands", "finished", "seconds"}, in the order they were done."""

    folder: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, given: str = "--output", whose: str = "an earlier pipeline's") -> "State":
        """Read the state of ``folder``, which ``given`` names. Raises UserError if the file is damaged, or if the folder
        holds something else than ``whose``."""
        path = folder / STATE
        if not path.exists():
            others = [entry.name for entry in folder.iterdir() if entry.name != "lock"] if folder.is_dir() else []
            if others:
                raise UserError(f"{given} {folder} contains {others[0]} and no {STATE}: give a new folder, or {whose}")
            return cls(folder)
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("steps"), dict):
            raise UserError(f"{path} is damaged: move it away to begin again (complete runs are not repeated)")
        return cls(folder, found["steps"])

    def facts(self, step: str) -> dict[str, Any]:
        """The results of ``step``; empty if it is not done."""
        return dict(self.steps.get(step, {}).get("facts", {}))

    def inputs(self, step: str) -> dict[str, Any]:
        """The inputs that ``step`` was done with; empty if it is not done."""
        return dict(self.steps.get(step, {}).get("inputs", {}))

    def changes(self, step: str, inputs: Mapping[str, Any]) -> list[str] | None:
        """None if ``step`` is not done; otherwise descriptions of the inputs that have changed since. Settings that do not
        distinguish runs are ignored: earlier versions recorded them as inputs."""
        return differences(self.steps[step]["inputs"], inputs) if step in self.steps else None

    def finish(
        self, step: str, inputs: Mapping[str, Any], facts: Mapping[str, Any], commands: list[str], seconds: float
    ) -> None:
        """Record a finished step; the file is written before this returns."""
        self.steps.pop(step, None)  # steps are kept in the order in which they were done
        self.steps[step] = {
            "inputs": dict(inputs),
            "facts": dict(facts),
            "commands": commands,
            "finished": time.time(),
            "seconds": seconds,
        }
        self.write()

    def forget(self, steps: list[str]) -> None:
        for step in steps:
            self.steps.pop(step, None)
        self.write()

    def write(self) -> None:
        write_json(self.folder / STATE, {"steps": self.steps})


class Stopped(Exception):
    """A command ended without finishing its step; the argument is the exit code."""

    @property
    def code(self) -> int:
        return int(self.args[0])

    def text(self, step: str) -> str:
        """What a user is told. The command itself has said why it failed."""
        if self.code in (0, INTERRUPTED):  # 0: it waits for something, such as jobs in a queue
            return f"stopped in step {step} (the same command continues with it)"
        return (
            f"step {step} failed (exit code {self.code}; the reason is above). Once that is mended, the same command "
            "continues with this step, and --redo STEP does an earlier one again with other settings"
        )


def move_aside(path: Path) -> None:
    """Give ``path``, a file or a folder, another name beside its own, if it exists, and say so."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.replace(path, aside)
    print(f"{path} was moved to {aside}", file=sys.stderr)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Descriptions of the inputs that have changed."""
    names = [name for name in dict.fromkeys([*before, *now]) if name in now or not is_free(name)]
    return [_changed(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _changed(name: str, before: Any, now: Any) -> str:
    if name.endswith("(content)"):
        what = "is new" if before is None else "is not there, or no longer read" if now is None else "has changed"
        return f"{name.removesuffix(' (content)')} {what}"
    if _sections(before) and _sections(now) and len(before) == len(now):
        inside = [flat({str(number): one for number, one in enumerate(of, 1)}, f"{name}.") for of in (before, now)]
        return "; ".join(differences(*inside))
    return f"{name} was {before!r}, is now {now!r}"


def _sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def content(path: Path) -> str:
    """A hash of a file, or of every recipe and table of a folder; empty if there is nothing."""
    if path.is_dir():
        files = sorted([*path.glob("*.yaml"), *path.glob("*.csv"), *path.glob("*.json")])
    else:
        files = [path] if path.is_file() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest() if files else ""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings into dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def shown(changes: list[str]) -> str:
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more
