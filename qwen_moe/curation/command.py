"""`qwen-moe data curate RECIPE`: filters, scores, domains, deduplication, decontamination, weights, token files.

Every finished step is recorded with its settings. The same command continues after the last finished step, and inside a
step after its last finished task. A step that was done with other settings is refused, with a message that names them.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_moe.curation.names import STEPS

if TYPE_CHECKING:
    from qwen_moe.curation.step import Context, Step

NEEDS = ("datatrove",)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from qwen_moe.data.command import verbs_of_data

    parser = verbs_of_data(subparsers).add_parser(
        "curate", help="filter, score, deduplicate and weigh documents by a recipe of steps, resumable at every step"
    )
    parser.add_argument("recipe", type=Path, help="a section for each step; see recipes/curate_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument("--until", choices=STEPS, metavar="STEP", help=f"stop after this step: {', '.join(STEPS)}")
    parser.add_argument("--redo", choices=STEPS, metavar="STEP", help="do this step and all that follow again")
    parser.add_argument(
        "--why", metavar="ID", help="print what every step decided about the document ID, and do nothing"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with a section slurm: write the script of the next job, and submit nothing",
    )
    parser.add_argument("--json", action="store_true", help="print the facts of the page as one JSON object")
    parser.set_defaults(func=run, needs=NEEDS)


def run(args: argparse.Namespace) -> int:
    """Do the steps that are not done, and write the page. Returns the exit code."""
    from launchers.local.lock import RunLock
    from qwen_moe.curation.execute import Executor
    from qwen_moe.curation.page import facts_of, write_page
    from qwen_moe.curation.recipe import load_curation
    from qwen_moe.curation.step import Context
    from qwen_moe.curation.steps import check, steps_of
    from qwen_moe.curation.why import explain
    from qwen_moe.errors import UserError
    from qwen_moe.workflow.state import State

    config = load_curation(args.recipe, args.overrides)
    if args.dry_run and config.slurm is None:
        raise UserError("--dry-run writes the script of a Slurm job: give the section slurm in the recipe")
    opened = (config.run_dir, "run_dir", "that of an earlier curation")
    if args.why is not None:
        print(explain(config, State.open(*opened), args.why))
        return 0
    for name in (args.until, args.redo):
        if name and name not in config.steps:
            raise UserError(f"{args.recipe} has no step {name}; it has {', '.join(config.steps)}")
    State.open(*opened)  # it is refused before it is locked, which makes it
    executor = Executor(config.workers, config.slurm)
    lock = RunLock(config.run_dir)
    try:
        at = Context(config=config, source=str(args.recipe), state=State.open(*opened), lock=lock, executor=executor)
        check(at)
        _find(at)
        at.state.write()  # the folder is known to be ours before a step writes into it
        if args.redo:
            _redo(at, args.redo)
        steps = steps_of(config)
        for number, step in enumerate(steps, start=1):
            if code := _one(at, step, f"[{number}/{len(steps)}] {step.name}", args.dry_run):
                return 0 if args.dry_run else code
            if step.name == args.until:
                break
        page = write_page(at)
        if step is not steps[-1]:
            print(f"stopped after {args.until}, as --until says; without it the command continues", file=sys.stderr)
        print(json.dumps(facts_of(at)) if args.json else page)
        return 0
    finally:
        lock.close()


def _find(at: "Context") -> None:
    """The files of the inputs. Once they were read they are no longer needed, and may be gone."""
    from qwen_moe.curation.reading import find_places
    from qwen_moe.data.sources import MissingInput

    try:
        at.places = find_places(at.config.input, at.config.tasks)
    except MissingInput as error:
        if "read" not in at.state.steps:
            raise
        print(f"{error}; what was read from it before is used", file=sys.stderr)


def _one(at: "Context", step: "Step", title: str, dry: bool) -> int:
    """Do a step unless it is done. Raises UserError if it was done, or begun, with other settings."""
    from launchers.folder.atomic import write_json
    from launchers.folder.run_folder import read_json
    from qwen_moe.curation.page import line_of, write_page
    from qwen_moe.curation.steps import BEGUN
    from qwen_moe.errors import UserError
    from qwen_moe.workflow.state import differences, shown

    settings = json.loads(json.dumps(step.settings(at)))
    changes = at.state.changes(step.name, settings)
    begun = at.folder(step.name) / BEGUN
    if changes is None and (before := read_json(begun)) is not None:
        changes = differences(before, settings) or None
    if changes == []:
        step.clean(at)
        print(f"{title}: done before; {line_of(at, step.name)}", file=sys.stderr)
        return 0
    if changes:
        raise UserError(
            f"step {step.name} of {at.config.run_dir} was done, or begun, with other settings or inputs: {shown(changes)}. "
            f"Restore them to continue, use --redo {step.name} to do it and all that follow again (what is there is kept "
            "beside it), or give another run_dir"
        )
    print(f"{title}: {step.what}", file=sys.stderr)
    write_json(begun, settings)
    started = time.monotonic()
    for stage in step.stages(at):
        if dry:
            print(at.executor.script(stage))
            return 1
        at.executor.run(stage)
    at.state.finish(step.name, settings, step.facts(at), [], time.monotonic() - started)
    step.clean(at)
    print(f"{title}: {line_of(at, step.name)}", file=sys.stderr)
    write_page(at)
    return 0


def _redo(at: "Context", first: str) -> None:
    """Forget a step and all that follow, and move what they wrote aside."""
    from qwen_moe.workflow.state import move_aside

    following = STEPS[STEPS.index(first) :]
    at.state.forget(list(following))
    for name in following:
        move_aside(at.folder(name))
