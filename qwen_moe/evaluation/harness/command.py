"""`qwen-moe evaluate tasks`. Torch and lm-evaluation-harness are imported only when they are used."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.errors import UserError
from qwen_moe.generation.command import add_checkpoint, add_reading
from qwen_moe.options import LARGEST, given_path, number, whole

_PARAMETERS = "max_gen_toks=64,temperature=0.7"


def _names(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected names with commas between them")
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: a task is given twice: leave one out")
    return found


def _limit(text: str) -> int | float:
    """An option type: so many documents of each task or, below 1, that share of them."""
    share = number(above=0)(text)
    return share if share < 1 else whole(1)(text)


def _parameters(text: str) -> dict[str, Any]:
    """An option type: NAME=VALUE with commas between, values as JSON where they are JSON."""
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not name.strip().isidentifier() or not equals:
            raise argparse.ArgumentTypeError(f"{part!r:.60} is not NAME=VALUE, such as {_PARAMETERS}")
        try:
            found[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            found[name.strip()] = value
    wrong = [value for value in found.values() if isinstance(value, float) and not abs(value) < float("inf")]
    if wrong:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: {wrong[0]} is not a finite number")
    return found


def register_tasks(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tasks` to the verbs of `evaluate`."""
    parser = verbs.add_parser("tasks", help="benchmarks and tasks of your own, through lm-evaluation-harness")
    add_checkpoint(parser, required=False)
    parser.add_argument(
        "--tasks",
        type=_names,
        required=True,
        metavar="NAME|FILE,...",
        help="tasks, groups and tags of lm-evaluation-harness, and YAML files of your own",
    )
    parser.add_argument(
        "--include", type=given_path, action="append", default=[], metavar="DIR", help="a folder with more tasks"
    )
    parser.add_argument(
        "--all-checkpoints",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="every checkpoint of a run, to compare them",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: RUN/evaluation/tasks, or evaluation/tasks-NAME; the same command continues there",
    )
    parser.add_argument(
        "--export-tests",
        type=Path,
        metavar="DIR",
        help="write the tasks' test texts there, for `data decontaminate`; without --checkpoint, nothing else is done",
    )
    parser.add_argument("--download", action="store_true", help="let data sets come from the Hugging Face hub")
    _add_asking(parser)
    add_reading(parser)
    parser.add_argument(
        "--dp", type=whole(1, 4096), default=1, help="groups of processes that share the texts; default: 1"
    )
    parser.add_argument("--no-table", action="store_true", help="write the results and print none")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")
    parser.set_defaults(func=_run, needs=("lm_eval",), may_split=True)


def _add_asking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the model is asked")
    group.add_argument(
        "--limit", type=_limit, metavar="N", help="documents of each task, or a share of them; default: all"
    )
    group.add_argument(
        "--num-fewshot", type=whole(0, 10_000), metavar="N", help="examples in a prompt; default: what the task says"
    )
    group.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template to the prompts")
    group.add_argument("--system", metavar="TEXT", help="a system message")
    group.add_argument(
        "--gen-kwargs",
        type=_parameters,
        default={},
        metavar="NAME=VALUE,...",
        help=f"how answers are generated, over what tasks say, such as {_PARAMETERS}",
    )
    group.add_argument(
        "--max-length", type=whole(2, LARGEST_SIZE), metavar="N", help="tokens that the model reads; default: its reach"
    )
    group.add_argument("--seed", type=whole(0, LARGEST), default=0, help="of tasks that sample; default: %(default)s")
    group.add_argument(
        "--allow-code", action="store_true", help="run tasks that execute what the model writes, outside of a sandbox"
    )


def _run(args: argparse.Namespace) -> int:
    from qwen_moe.evaluation.harness.library import check_files, stay_offline

    if not args.download:
        stay_offline()
    check_files(args.tasks, args.include)
    if args.checkpoint is None and args.export_tests is None:
        raise UserError("--checkpoint is missing: give a checkpoint, a run directory or a Hugging Face directory")
    if args.export_tests is not None and not args.all_checkpoints:
        from parallel.process import started_by_launcher

        if not started_by_launcher():
            from qwen_moe.evaluation.harness.run import export_tests

            export_tests(args)
        if args.checkpoint is None:
            return 0
    return _all(args) if args.all_checkpoints else _one(args)


def _one(args: argparse.Namespace) -> int:
    from qwen_moe.generation.launch import in_session

    return in_session(args, lambda session: _evaluate(args, session))


def _evaluate(args: argparse.Namespace, session: Any) -> int:
    from qwen_moe.evaluation.harness.results import as_table, file_name, results_file
    from qwen_moe.evaluation.harness.run import evaluate_tasks, run_of

    directory = session.opened.weights.directory
    output = args.output or default_output(run_of(directory), args.checkpoint)
    results = evaluate_tasks(args, session, output)
    if results is None or args.no_table:
        return 0
    if args.json:
        print(json.dumps(results))
    else:
        print(as_table(results["tasks"]))
        print(f"written: {results_file(output, file_name(directory.resolve().name))}")
    return 0


def default_output(run: Path | None, checkpoint: Path) -> Path:
    from qwen_moe.runs.task_scores import FOLDER

    return run / FOLDER if run is not None else Path("evaluation") / f"tasks-{checkpoint.resolve().name}"


def _all(args: argparse.Namespace) -> int:
    """Evaluate the checkpoints of a run one after another, each by a command of its own where it is split over processes."""
    from launchers.folder.run_folder import CHECKPOINTS
    from parallel.process import started_by_launcher
    from qwen_moe.checkpoint.directory import list_checkpoints
    from qwen_moe.evaluation.harness.results import as_comparison, file_name, results_file

    if started_by_launcher():
        raise UserError("--all-checkpoints starts its processes itself: call it without torchrun or srun")
    found = list_checkpoints(args.checkpoint / CHECKPOINTS) or list_checkpoints(args.checkpoint)
    if not found:
        raise UserError(f"--all-checkpoints: {args.checkpoint} is no run with checkpoints: give a run directory")
    run = args.checkpoint if (args.checkpoint / CHECKPOINTS).is_dir() else args.checkpoint.resolve().parent
    output = args.output or default_output(run, args.checkpoint)
    for path in found:
        changes = {"checkpoint": path, "output": output, "all_checkpoints": False, "no_table": True}
        argv = [*args.argv, "--no-all-checkpoints", "--no-table", f"--checkpoint={path}", f"--output={output}"]
        print(f"{path.name}:", file=sys.stderr)
        if code := _one(argparse.Namespace(**vars(args) | changes | {"argv": argv})):
            return code
    results = {
        path.name: json.loads(results_file(output, file_name(path.resolve().name)).read_text(encoding="utf-8"))
        for path in found
    }
    print(json.dumps(results) if args.json else as_comparison(results))
    return 0
