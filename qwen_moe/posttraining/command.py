"""`qwen-moe post-train RECIPE`: fine-tune, sample, pair, DPO, reward model, GRPO, and measure every model.

Every finished step is recorded with its inputs. The same command continues after the last finished step. A step that was
done from other inputs is refused, with a message that names what changed.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_moe.posttraining.steps import Context, Step

STOPPING_SECONDS = 300.0  # for what a killed walk left behind, which may be saving a checkpoint
NAMES = ("sft", "rollout", "pairs", "dpo", "reward_model", "grpo")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "post-train", help="fine-tune a model, then teach it by pairs and by its own samples; resumable at every step"
    )
    parser.add_argument("recipe", type=Path, help="a section for each step; see recipes/post_training_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument("--until", choices=NAMES, metavar="STEP", help=f"stop after this step: {', '.join(NAMES)}")
    parser.add_argument(
        "--redo", choices=NAMES, metavar="STEP", help="do this step again, and those that work on what it makes"
    )
    parser.add_argument("--json", action="store_true", help="print the facts of the page as one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do the steps that are not done, and write the page. Returns the exit code."""
    from launchers.local.lock import RunLock
    from qwen_moe.errors import UserError
    from qwen_moe.posttraining.page import facts_of, write_page
    from qwen_moe.posttraining.recipe import STEPS, load_walk
    from qwen_moe.posttraining.steps import Context, steps_of
    from qwen_moe.posttraining.walk import Walk
    from qwen_moe.workflow.state import State

    assert STEPS == NAMES
    walk = Walk(load_walk(args.recipe, args.overrides), str(args.recipe))
    for option, name in (("--redo", args.redo), ("--until", args.until)):
        if name and name not in walk.config.steps:
            raise UserError(f"{option} {name}: {walk.source} has no such step; it has {', '.join(walk.config.steps)}")
    opened = (walk.run_dir, "run_dir", "that of an earlier post-train")
    State.open(*opened)  # it is refused before it is locked, which makes it
    lock = RunLock(walk.run_dir, patience=STOPPING_SECONDS)
    try:
        at = Context(walk=walk, state=State.open(*opened), lock=lock)
        at.state.write()  # the folder is known to be ours before a step writes into it
        if args.redo:
            _redo(at, args.redo)
        steps = steps_of(walk)
        until = max((n for n, step in enumerate(steps) if args.until in step.name.split()), default=len(steps) - 1)
        try:
            code = _all(at, steps[: until + 1], len(steps))
        finally:
            page = write_page(at)
        if code:
            return code
        if until + 1 < len(steps):
            print(f"stopped after {args.until}, as --until says; without it the command continues", file=sys.stderr)
        print(json.dumps(facts_of(at)) if args.json else page)
        return 0
    finally:
        lock.close()


def _all(at: "Context", steps: list["Step"], total: int) -> int:
    """Do the steps in order. Returns the exit code of the first that ends early, 0 if all are done."""
    from qwen_moe.posttraining.page import write_page
    from qwen_moe.workflow.state import Stopped

    for number, step in enumerate(steps, start=1):
        try:
            _one(at, step, f"[{number}/{total}] {step.name}")
        except Stopped as stopped:
            print(stopped.text(step.name), file=sys.stderr)
            return stopped.code
        write_page(at)
    return 0


def _one(at: "Context", step: "Step", title: str) -> None:
    """Do a step unless it is done. Raises UserError if it was done from other inputs, and Stopped."""
    from qwen_moe.errors import UserError
    from qwen_moe.posttraining.steps import Measuring
    from qwen_moe.workflow.state import move_aside, shown

    changes = at.state.changes(step.name, step.inputs(at))
    if changes == []:
        print(f"{title}: done before", file=sys.stderr)
        return
    if changes and not isinstance(step, Measuring):
        raise UserError(
            f"step {step.name} of {at.walk.run_dir} was done with other settings or inputs: {shown(changes)}. Restore them "
            f"to continue, use --redo {step.name} to do it again with all that works on what it makes (what is there is "
            "kept beside it), or give another run_dir"
        )
    again = f" again, because {shown(changes)}" if changes else ""
    print(f"{title}: {step.what}{again}", file=sys.stderr)
    if changes:
        for path in step.output:
            move_aside(path)
    at.commands = []
    begun = time.monotonic()
    facts = step.do(at)
    # Compute the inputs again: a step may have read files that were not there before.
    at.state.finish(step.name, step.inputs(at), facts, at.commands, time.monotonic() - begun)


def _redo(at: "Context", first: str) -> None:
    """Forget a step and all that work on its output, and move what they wrote aside."""
    from qwen_moe.posttraining.steps import that_follow
    from qwen_moe.workflow.state import move_aside

    following = that_follow(at.walk, first)
    at.state.forget([step.name for step in following])
    for step in following:
        for path in step.output:
            move_aside(path)
