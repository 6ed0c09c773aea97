"""`qwen-moe pipeline RECIPE`: prepare, ladder, run, collect, fit, recommend, plan, launch.

Every finished step is recorded with its inputs. The same command continues after the last finished step. A step whose
inputs have changed is done again, with all steps after it, and a message names what changed.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.local.lock import RunLock
from qwen_moe.config.fields import MOST_PROCESSES
from qwen_moe.errors import UserError
from qwen_moe.options import number, whole

if TYPE_CHECKING:
    from qwen_moe.workflow.steps import Context, Step

NAMES = ("prepare", "ladder", "run", "collect", "fit", "recommend", "plan", "launch")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "pipeline", help="find learning rate, batch size and layout with small runs, and write the job; resumable"
    )
    parser.add_argument("recipe", type=Path, help="the recipe of the large run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for everything (default: runs/RECIPE-pipeline)"
    )
    parser.add_argument("--flops-budget", type=number(above=0), help="FLOPs of all small runs together, 6 N_active D")
    parser.add_argument("--until", choices=NAMES, metavar="STEP", help=f"stop after this step: {', '.join(NAMES)}")
    parser.add_argument("--redo", choices=NAMES, metavar="STEP", help="do this step and all later steps again")
    parser.add_argument("--yes", action="store_true", help="do not ask before expensive steps")
    parser.add_argument(
        "--loss", choices=("train", "validation"), default="train", help="the loss of small runs that the fit uses"
    )
    parser.add_argument("--parallel", type=whole(1), help="small runs at a time (default: 1; with --slurm: all)")
    parser.add_argument("--threads", type=whole(1), help="threads of each process of a small run")
    parser.add_argument("--slurm", action="store_true", help="run the small runs as a Slurm job array")
    parser.add_argument("--skip-failed", action="store_true", help="fit without the small runs that failed")
    parser.add_argument("--accept-extrapolation", action="store_true", help="see `scaling recommend`")
    parser.add_argument(
        "--gpus", type=whole(0, MOST_PROCESSES), default=0, help="GPUs of the large run: plan its layout and its job"
    )
    parser.add_argument("--gpu", default="h100-80gb", help="as for `plan` (default: h100-80gb)")
    parser.add_argument("--gpus-per-node", type=whole(1, MOST_PROCESSES), default=8, help="default: 8")
    parser.add_argument("--network", default="", help="as for `plan` (default: ib400)")
    parser.add_argument("--time", default="", help="time limit of jobs")
    parser.add_argument("--site", type=Path, help="site file, see docs/slurm.md")
    parser.add_argument("--submit", action="store_true", help="submit the job instead of only writing its script")
    parser.set_defaults(func=run, needs=("scipy", "pandas", "matplotlib"))


def run(args: argparse.Namespace) -> int:
    """Run the steps. ``args.build_parser`` makes the parser of all verbs, which steps are called with."""
    from qwen_moe.config import load_config
    from qwen_moe.scaling.ladder import check_target
    from qwen_moe.workflow.checks import check_options, check_steps
    from qwen_moe.workflow.page import write_page
    from qwen_moe.workflow.state import State, Stopped
    from qwen_moe.workflow.steps import NAMES as STEPS_IN_ORDER
    from qwen_moe.workflow.steps import STEPS, Context

    assert STEPS_IN_ORDER == NAMES
    check_options(args)
    config = load_config(args.recipe, args.overrides)
    check_target(config, "qwen-moe pipeline")
    folder = args.output or Path("runs") / f"{args.recipe.stem}-pipeline"
    State.open(folder)  # it is refused before it is locked, which makes it
    lock = RunLock(folder)
    try:
        state = State.open(folder)  # what a pipeline that ended just now has done
        at = Context(args=args, config=config, state=state, parser=args.build_parser())
        last = NAMES.index(args.until) if args.until else len(NAMES)
        check_steps(args, config, state, NAMES[: last + 1])
        if args.redo:
            _redo(at, args.redo)
        for number, step in enumerate(STEPS, start=1):
            try:
                if not _one(at, step, f"[{number}/{len(STEPS)}] {step.name}"):
                    return 0
            except Stopped as stopped:
                print(stopped.text(step.name), file=sys.stderr)
                return stopped.code
            finally:
                write_page(at)
            if args.until == step.name:
                print(
                    f"stopped after {step.name}, as --until says; the same command without --until continues",
                    file=sys.stderr,
                )
                break
        print(folder / "pipeline.md")
        return 0
    finally:
        lock.close()


def _redo(at: "Context", first: str) -> None:
    """Forget a step and all steps after it. An existing ladder is moved aside, not deleted."""
    from qwen_moe.workflow.state import move_aside
    from qwen_moe.workflow.steps import LADDER

    at.state.forget(list(NAMES[NAMES.index(first) :]))
    if NAMES.index(first) <= NAMES.index("ladder"):
        move_aside(at.folder / LADDER)


def _one(at: "Context", step: "Step", title: str) -> bool:
    """Do a step unless it is done. Returns False if the user does not want to continue. Raises UserError, Stopped."""
    from qwen_moe.workflow.state import move_aside, shown

    inputs = step.inputs(at)
    changes = at.state.changes(step.name, inputs)
    if changes == []:
        print(f"{title}: done before", file=sys.stderr)
        return True
    if changes and step.keeps:
        raise UserError(
            f"the {step.name} of {at.folder} was made from other inputs: {shown(changes)}. Restore them to continue, "
            f"use --redo {step.name} to make a new one (the old one is kept beside it), or give another --output"
        )
    again = f" again, because {shown(changes)}" if changes else ""
    print(f"{title}: {step.what}{again}", file=sys.stderr)
    if changes is None and step.keeps:
        move_aside(at.folder / step.name)  # it is incomplete, because a finished step would be recorded
    if step.cost is not None and (step.name == "run" or at.args.submit) and not _confirmed(at, step):
        return False
    at.commands = []
    begun = time.monotonic()
    facts = step.do(at)
    # Compute the inputs again: a step may have written some of its own inputs.
    at.state.finish(step.name, step.inputs(at), facts, at.commands, time.monotonic() - begun)
    return True


def _confirmed(at: "Context", step: "Step") -> bool:
    """Print what the step will cost, and ask unless --yes is given. Raises UserError if there is no terminal to ask on."""
    assert step.cost is not None
    lines = step.cost(at)
    for line in lines:
        print(f"  {line}", file=sys.stderr)
    if at.args.yes or not lines:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            f"step {step.name} is expensive ({'; '.join(lines)}), and there is no terminal to ask on: add --yes, or "
            f"--until {NAMES[NAMES.index(step.name) - 1]} to stop before it"
        )
    print("  continue? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print(f"stopped before {step.name}; the same command asks again", file=sys.stderr)
    return False
