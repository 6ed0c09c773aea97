"""What a step of a curation is, and what all steps work with."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.local.lock import RunLock
from qwen_moe.curation.dedup import WORK
from qwen_moe.curation.documents import KEPT, tallied
from qwen_moe.curation.execute import Executor, Stage
from qwen_moe.curation.reading import Place
from qwen_moe.curation.recipe import NUMBERS, CurateConfig
from qwen_moe.workflow.state import State, flat


@dataclass
class Context:
    """What steps work with."""

    config: CurateConfig
    source: str
    state: State
    lock: RunLock
    executor: Executor
    places: list[Place] = field(default_factory=list)

    def folder(self, step: str) -> Path:
        return self.config.run_dir / f"{NUMBERS[step]}-{step}"

    def before(self, step: str) -> Path:
        """The documents that the step before ``step`` left."""
        steps = [name for name in self.config.steps if name not in ("synthesise", "prepare")]
        names = [name for name in steps if NUMBERS[name] < NUMBERS[step]]
        return self.folder(names[-1]) / KEPT


class Step(ABC):
    """A step by its ``name``. Between the stages that `stages` yields, all of which are done when the next is asked for, it
    does what needs all documents. What it leaves is in its folder."""

    name: str
    what: str

    @abstractmethod
    def settings(self, at: Context) -> dict[str, Any]:
        """What decides the result, by name, beside what the step before left."""

    @abstractmethod
    def stages(self, at: Context) -> Iterator[Stage]:
        """The stages, in order."""

    def facts(self, at: Context) -> dict[str, Any]:
        """Counts of what was kept and dropped."""
        return {"tally": tallied(at.folder(self.name))}

    def clean(self, at: Context) -> None:
        """Remove what only the stages needed, and what writes that were killed have left; also called after a stop between
        the end of the step and this."""
        folder = at.folder(self.name)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        for half in folder.rglob(".*.????????"):  # as `launchers.folder.atomic` names them
            half.unlink(missing_ok=True)


def named(step: str, values: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, as they are recorded."""
    return flat(json.loads(json.dumps(values)), f"{step}.")
