"""Which tasks lm-evaluation-harness has, those of this package and the user's among them, and what they say when loaded.

Nothing is downloaded unless asked for.
"""

import difflib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_moe.errors import UserError

LOCAL = Path(__file__).parent / "local"
_SEED = 1234  # of examples, as in lm_eval.simple_evaluate
_YAML = (".yaml", ".yml")
# `task: NAME`, and `tag: NAME` or a list, in one line or several.
_DEFINES = re.compile(rb"^\"?(?:task|group|tag|class)\"?:((?:[^\n]*)(?:\n *- +[^\n]*)*)", re.MULTILINE)
_NAME = re.compile(rb"[^\s\"'\[\],#]*\w[^\s\"'\[\],#]*")


def stay_offline() -> None:
    """Keep Hugging Face's libraries from the network, also where they are imported already."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_DATASETS_OFFLINE")):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)


def harness_names() -> set[str]:
    """The tasks, groups and tags that the files of the harness itself define, found without parsing them: that takes five
    times as long."""
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    found: set[str] = set()
    for path in root.rglob("*"):
        # Some files are only included by others, and have names without an ending.
        if (path.suffix not in (*_YAML, "") and "yaml" not in path.name) or not path.is_file():
            continue
        for line in _DEFINES.finditer(path.read_bytes()):
            found.update(name.decode(errors="replace") for name in _NAME.findall(line[1]))
    return found


def check_files(names: Sequence[str], include: Sequence[Path]) -> None:
    """Raise UserError for files and folders of tasks that are not there."""
    for folder in include:
        if not folder.is_dir():
            raise UserError(f"--include {folder} is not a folder: give one with YAML files of tasks")
    for name in names:
        if name.endswith(_YAML) and not Path(name).is_file():
            raise UserError(
                f"--tasks {name} does not exist: give a YAML file of lm-evaluation-harness, or a task's name"
            )


class Library:
    """The tasks named ``names`` (tasks, groups, tags, or YAML files), found here, in ``include``, and among those of the
    harness. Raises UserError for unknown names."""

    def __init__(self, names: Sequence[str], include: Sequence[Path] = ()) -> None:
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what a user needs of its warnings, we say
        check_files(names, include)
        self.names = names
        folders = [str(LOCAL), *map(str, include)]
        self._manager = TaskManager(include_path=folders, include_defaults=False)
        others = [name for name in names if name not in self._manager.task_index and not name.endswith(_YAML)]
        if others:
            known = harness_names() | set(self._manager.all_tasks)
            for name in others:
                if name not in known:
                    raise UserError(_unknown(name, sorted(known)))
            self._manager = TaskManager(include_path=folders)  # takes seconds: it parses thousands of files

    def load(self) -> dict[str, Any]:
        """What `lm_eval.evaluator.evaluate` takes: new task objects with their documents. Raises UserError."""
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for name in self.names:
            try:
                loaded = self._manager.load([name])
            except Exception as error:  # a task's file may do anything
                raise UserError(self._refused(name, error)) from None
            for task in loaded["tasks"]:
                if task in tasks:
                    raise UserError(f"--tasks asks for {task} twice, in {owner[task]} and in {name}: leave one out")
                owner[task] = name
                _check_metrics(name, task, loaded["tasks"][task])
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
        return {"tasks": tasks, "groups": groups}

    def _refused(self, name: str, error: Exception) -> str:
        entry = self._manager.task_index.get(name)
        config = (entry.cfg if entry is not None else None) or {}
        names = {type(one).__name__ for one in _chain(error)}
        missing = {"ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError"}
        if names & missing:
            path, part = config.get("dataset_path"), config.get("dataset_name")
            what = f"the data set {path}" + (f" ({part})" if part else "") if path else "a data set"
            download = f"hf download --repo-type dataset {path}" if path else "hf download --repo-type dataset NAME"
            return (
                f"--tasks {name} needs {what}, which is not on this machine ({_first_line(error)}): give --download, or on "
                f"a machine with network run `{download}` and this command with --download --limit 1, and copy its folder "
                "~/.cache/huggingface (HF_HOME) here"
            )
        where = name if name.endswith(_YAML) else getattr(entry, "yaml_path", name)
        text = f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(error, StopIteration):
            text = "its data have no document"
        elif isinstance(error, IndexError) and str(error) == "string index out of range":
            text = "its first document has an empty choice"
        return f"--tasks {name}: {where} cannot be loaded: {text}"


def configure(tasks: dict[str, Any], num_fewshot: int | None, gen_kwargs: dict[str, Any]) -> None:
    """Settings of a command over those of the tasks, as `lm_eval.simple_evaluate` applies them: a task that sets its
    examples to 0 keeps 0."""
    for task in tasks.values():
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=gen_kwargs, update=True)
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)


def texts_of(task: Any) -> Iterator[str]:
    """The test texts of a task, question and right answer, one for each document."""
    for document in task.eval_docs:
        question, answer = task.doc_to_text(document), task.doc_to_target(document)
        choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else None
        if isinstance(answer, list):
            answer = answer[0] if answer else ""
        if isinstance(question, int) and choices is not None:  # the choices are what comes before the answer
            question = _choice(choices, question)
        elif isinstance(answer, int) and choices is not None:
            answer = _choice(choices, answer)
        answer = str(answer)
        glue = task.config.target_delimiter if question and answer else ""
        yield f"{question}{glue}{answer}"


def _choice(choices: Sequence[Any], number: int) -> Any:
    """Empty if there is no such choice."""
    return choices[number] if 0 <= number < len(choices) else ""


def _metrics(task: Any) -> dict[str, Any]:
    """The metrics that a task asks the harness for, with its functions; empty if the task computes its own."""
    own = getattr(getattr(task, "config", None), "process_results", None) is not None
    return {} if own else dict(getattr(task, "_metric_fn_list", {}))


def _check_metrics(name: str, task: str, loaded: Any) -> None:
    lacking = [metric for metric, function in _metrics(loaded).items() if function is None]
    if lacking:
        raise UserError(
            f"--tasks {name}: {task} asks for the metric {', '.join(lacking)}, which the harness does not have or cannot "
            "load here: correct metric_list, or install what the metric needs"
        )


def not_computed(task: Any, computed: Iterable[str]) -> str:
    """What to tell of the metrics that a task asks for and the harness did not compute; empty if there are none."""
    lacking = sorted(set(_metrics(task)) - set(computed))
    if not lacking:
        return ""
    kind = task.config.output_type
    return f"has no {', '.join(lacking)}, because the harness does not compute that for output_type {kind}"


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, [one for one in known if len(one) > 3], n=5, cutoff=0.5)
    local = sorted(path.stem for path in LOCAL.glob("*.yaml"))
    hint = f"did you mean {', '.join(near)}?" if near else f"without downloads there are {', '.join(local)}."
    return f"--tasks {name:.60}: there is no such task: {hint} A file ends in .yaml, its folder goes to --include"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
