"""Evaluates one checkpoint: runs the harness with our model, and writes its results, its samples and the answers."""

import argparse
import json
import random
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launchers.counted import counted
from launchers.folder.atomic import write_text
from launchers.folder.run_folder import CHECKPOINTS
from qwen_moe.checkpoint.directory import step_directories
from qwen_moe.checkpoint.fingerprint import fingerprint, tokenizer_fingerprint
from qwen_moe.checkpoint.huggingface.export import export_dtype
from qwen_moe.errors import UserError
from qwen_moe.evaluation.harness.answers import RequestAnswers, key_of
from qwen_moe.evaluation.harness.checked import prefixes_of, share_of_texts, warning
from qwen_moe.evaluation.harness.library import Library, configure, not_computed, texts_of
from qwen_moe.evaluation.harness.model import HarnessModel
from qwen_moe.evaluation.harness.results import file_name, results_file, task_record, write_results, write_samples
from qwen_moe.evaluation.harness.task_checks import check_choices, check_examples
from qwen_moe.evaluation.harness.work import Work, serve
from qwen_moe.generation.command import reading_of
from qwen_moe.generation.session import Session
from qwen_moe.generation.tokenizer import tokenizer_folder
from qwen_moe.runs.records import RESOLVED


def run_of(checkpoint: Path) -> Path | None:
    """The run that ``checkpoint`` (a directory of weights) belongs to; None if it belongs to none."""
    folder = checkpoint.resolve().parent
    run = folder.parent
    return run if folder.name == CHECKPOINTS and (run / RESOLVED).is_file() else None


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint of a run was written at."""
    found = step_directories(checkpoint.resolve().parent)
    return next((step for step, path in found.items() if path.name == checkpoint.resolve().name), None)


def evaluate_tasks(args: argparse.Namespace, session: Session, output: Path) -> dict[str, Any] | None:
    """Evaluate the checkpoint of ``session`` on the tasks of ``args``. Returns its results; None on ranks that only compute.

    Answers are on the disk as they come, so that the same command goes on after a stop. Raises UserError.
    """
    longest = session.reach(args.max_length)
    if not session.reports:
        serve(session)
        return None
    library = Library(args.tasks, args.include)
    loaded = library.load()
    configure(loaded["tasks"], args.num_fewshot, args.gen_kwargs)
    if args.chat and session.opened.tokenizer.chat_template is None:
        raise UserError(
            f"{session.opened.tokenizer.name_or_path} has no chat template (in tokenizer_config.json or "
            "chat_template.jinja): leave --chat out, or add the template of the model"
        )
    for task_name, task in loaded["tasks"].items():
        for text in (check_choices(task_name, task, args.limit), check_examples(task_name, task)):
            if text:
                session.say(f"warning: {text}")
    session.say_if_no_chat(args.chat, [{"prompt": None}])
    checkpoint = identity_of(args, session, longest)
    name = session.opened.weights.directory.resolve().name
    work = Work(session)
    with RequestAnswers(output / f"answers-{file_name(name)}.jsonl") as answers:
        model = HarnessModel(work, longest, _decisive(args, checkpoint), answers, args.seed)
        found = _evaluate(args, model, loaded)
    work.end()
    _say(session, model.counts, longest)
    records = _records(args, loaded["tasks"], found, prefixes_of(run_of(session.opened.weights.directory) or Path()))
    for task, record in records.items():
        if text := warning(task, record.get("checked_for_leaks")):
            session.say(f"warning: {text}")
        computed = [metric["metric"] for metric in record["metrics"]]
        if task in loaded["tasks"] and (text := not_computed(loaded["tasks"][task], computed)):
            session.say(f"warning: {task} {text}")
    write_samples(output / "samples" / file_name(name), found["samples"])
    return write_results(results_file(output, file_name(name)), checkpoint, version("lm_eval"), records)


def identity_of(args: argparse.Namespace, session: Session, longest: int) -> dict[str, Any]:
    """Which model was evaluated, and how it computed."""
    weights = session.opened.weights
    dtype = export_dtype(args.dtype) or weights.dtype
    return {
        "path": str(weights.directory),
        "step": step_of(weights.directory),
        "model": fingerprint(weights.directory),
        "tokenizer": tokenizer_fingerprint(tokenizer_folder(weights.directory)),
        "dtype": str(dtype).removeprefix("torch."),
        "max_length": longest,
        **reading_of(args),
    }


def _decisive(args: argparse.Namespace, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What answers depend on beside the request: not where the checkpoint lies, and not the layout."""
    return {name: value for name, value in checkpoint.items() if name not in ("path", "step")} | {"seed": args.seed}


def _evaluate(args: argparse.Namespace, model: HarnessModel, loaded: dict[str, Any]) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` without its survey of the machine, which takes longer than a small model."""
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    try:
        return dict(
            evaluate(
                lm=model,
                task_dict=loaded,
                limit=args.limit,
                log_samples=True,
                system_instruction=args.system,
                apply_chat_template=args.chat,
                fewshot_as_multiturn=args.chat,
                confirm_run_unsafe_code=args.allow_code,
            )
        )
    except Exception as error:
        if _raised_here(error):
            raise
        text = f"{type(error).__name__}: {error}"
        raise UserError(
            f"the harness cannot evaluate {', '.join(loaded['tasks'])}: {text:.300} (--traceback shows where). Correct the "
            "task's file, or leave the task out"
        ) from error


def _raised_here(error: BaseException) -> bool:
    """Whether our code, or torch under it, raised ``error``, rather than the harness, a task's template or its functions."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = names[max((i for i, name in enumerate(names) if name.startswith("lm_eval.")), default=0) :]
    return isinstance(error, UserError) or any(name.startswith("qwen_moe.") for name in inner)


def _records(
    args: argparse.Namespace, tasks: Mapping[str, Any], found: Mapping[str, Any], trained_on: Sequence[Path]
) -> dict[str, Any]:
    settings = {
        "limit": args.limit,
        "chat": args.chat,
        "system": args.system,
        "gen_kwargs": args.gen_kwargs,
        "seed": args.seed,
    }
    records = {}
    for name in found["results"]:
        records[name] = task_record(name, found, settings)
        if name in tasks and (share := share_of_texts(trained_on, texts_of(tasks[name]))) is not None:
            records[name]["checked_for_leaks"] = share
    return records


def _say(session: Session, counts: Mapping[str, int], longest: int) -> None:
    if count := counts.get("truncated"):
        session.say(
            f"{counted(count, 'prompt was', 'prompts were')} longer than the {longest:,} tokens that the model reads: "
            "their beginning was cut off"
        )
    if count := counts.get("unknown"):
        session.say(
            f"{counted(count, 'answer holds', 'answers hold')} something that the tokenizer does not know (its "
            "unknown token): their probabilities mean little"
        )
    for line in session.notes():
        session.say(line)


def export_tests(args: argparse.Namespace) -> list[Path]:
    """Write the test texts of the tasks of ``args``, a file of JSON lines for each task. Returns the files."""
    tasks = Library(args.tasks, args.include).load()["tasks"]
    paths = []
    for name, task in tasks.items():
        path = args.export_tests / f"{file_name(name)}.jsonl"
        texts = list(dict.fromkeys(texts_of(task)))
        rows = [{"text": text, "id": f"{name}-{key_of(text)[:16]}"} for text in texts if text.strip()]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{path}: {counted(len(rows), 'text')}", file=sys.stderr)
        paths.append(path)
    return paths
