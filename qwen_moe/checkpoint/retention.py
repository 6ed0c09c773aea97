"""Decides which checkpoints of a run are deleted. Only good ones count: they are written by this run, or checked, and on
its trajectory.

A run that finds its newest checkpoint damaged resumes from an older one. Checkpoints after that are abandoned: if they
counted as kept, they would displace good ones. When the next checkpoint is written, they are renamed to
`step_X.abandoned`. They are deleted when the run has passed their step.
"""

import os
import re
from pathlib import Path

from qwen_moe.checkpoint.directory import (
    CheckpointDamaged,
    partial_path,
    remove_directory,
    step_directories,
    verify,
)

_ABANDONED = re.compile(r"step_(\d+)\.abandoned")


class Retention:
    """Keeps the newest ``keep`` good checkpoints under ``root`` and those of ``keep_steps``, and deletes the others.

    The run reports its position by `went_back_to` and `written`. Only one process may call `written`.
    """

    def __init__(self, root: Path, keep: int, keep_steps: tuple[int, ...] = ()) -> None:
        self.root, self.keep, self.keep_steps = root, keep, keep_steps
        self._good: list[int] = []  # ascending
        self._base = 0

    def went_back_to(self, step: int) -> None:
        """The run resumes from ``step``, whose checkpoint was checked (0: from the start). Later ones no longer count."""
        self._base = step
        self._good = [good for good in self._good if good < step] + ([step] if step else [])

    def written(self, step: int) -> None:
        """The checkpoint of ``step`` is complete: delete what is not kept, and the remains of interrupted writes. An
        interrupted deletion leaves a `.partial`, never a damaged checkpoint."""
        self._good = [good for good in self._good if good < step] + [step]
        present = step_directories(self.root)
        kept = self._newest_good(present) | set(self.keep_steps)
        for found, path in present.items():
            if found > self._base and found not in self._good:
                aside = path.with_name(path.name + ".abandoned")
                remove_directory(aside)
                os.replace(path, aside)
            elif found not in kept:
                remove_directory(partial_path(path))
                os.replace(path, partial_path(path))
        for path in self.root.glob("step_*.abandoned"):
            past = _ABANDONED.fullmatch(path.name)
            if past and int(past[1]) <= step:
                remove_directory(path)
        for path in self.root.glob("step_*.partial"):
            remove_directory(path)
        self._good = [good for good in self._good if good in kept]

    def _newest_good(self, present: dict[int, Path]) -> set[int]:
        """Steps of the newest ``keep`` good checkpoints. Checkpoints from before this start are checked only if one of them
        would be deleted in favor of another."""
        older = [step for step in sorted(present, reverse=True) if step <= self._base and step not in self._good]
        wanted = self.keep - len(self._good)
        if len(older) <= wanted:
            return set(self._good) | set(older)
        for step in older:
            if wanted <= 0:
                break
            try:
                verify(present[step])
            except CheckpointDamaged:
                continue
            self._good.append(step)
            wanted -= 1
        self._good.sort()
        return set(self._good[-self.keep :])
