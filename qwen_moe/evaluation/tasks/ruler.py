"""RULER's thirteen tasks by name (arXiv 2404.06654): eleven need no data, and two need files."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from launchers.counted import counted
from qwen_moe.errors import UserError
from qwen_moe.evaluation.tasks.coded_words import coded_words_task
from qwen_moe.evaluation.tasks.common_words import common_words_task
from qwen_moe.evaluation.tasks.documents import Collection, documents_task, read_hotpot, read_squad
from qwen_moe.evaluation.tasks.haystack import Essay
from qwen_moe.evaluation.tasks.niah import NIAH, niah_task
from qwen_moe.evaluation.tasks.task import Task
from qwen_moe.evaluation.tasks.variables import variables_task

OFFLINE = (*NIAH, "vt", "cwe", "fwe")
# Name, option with its file.
WITH_FILE = {"qa_1": "--squad", "qa_2": "--hotpot"}
NAMES = (*OFFLINE, *WITH_FILE)


def chosen(names: Sequence[str] | None, files: dict[str, Path | None]) -> list[str]:
    """The tasks to run: ``names`` or, for None, all that need no file and those whose file is given. ``files``: by task.

    Raises UserError.
    """
    if names is None:
        return [*OFFLINE, *(name for name, path in files.items() if path is not None)]
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"--tasks: {name!r} is no task of RULER: {meant}Choose from {', '.join(NAMES)}")
    for name, path in files.items():
        if (name in names) != (path is not None):
            option = WITH_FILE[name]
            fix = (
                f"needs a file: give {option} FILE"
                if path is None
                else f"is not in --tasks: leave {option} out, or add it"
            )
            raise UserError(f"task {name} {fix}")
    return sorted(set(names), key=NAMES.index)


def _collection(name: str, path: Path, samples: int) -> Collection:
    collection = read_squad(path) if name == "qa_1" else read_hotpot(path)
    if samples > len(collection.questions):
        raise UserError(
            f"--samples {samples} is more than the {counted(len(collection.questions), 'question')} of {path}: ask for fewer"
        )
    return collection


def ruler_tasks(names: Sequence[str], essay: Essay, files: dict[str, Path | None], samples: int) -> dict[str, Task]:
    """``names`` as `chosen` gives them. Raises UserError for a file that cannot be used."""
    tasks: dict[str, Task] = {}
    for name in names:
        path = files.get(name)
        if path is not None:
            tasks[name] = documents_task(name, _collection(name, path, samples))
        elif name in NIAH:
            tasks[name] = niah_task(name, essay)
        else:
            tasks[name] = {"vt": variables_task, "cwe": common_words_task, "fwe": coded_words_task}[name]()
    return tasks
