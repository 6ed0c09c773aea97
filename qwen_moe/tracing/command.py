"""`qwen-moe trace RECIPE --gpus N`: what one training step of one rank launches, without a GPU."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from qwen_moe.config import load_stage
from qwen_moe.config.fields import MOST_PROCESSES
from qwen_moe.options import whole


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "trace",
        help="count kernels, bytes, host waits and collectives of a step, without a GPU (docs/plan.md)",
        description="Builds one rank of the recipe's layout on fake tensors, runs a training step and counts what it "
        "launches: operations, bytes, FLOPs, waits of the host, collectives and what runs beside them.",
    )
    parser.add_argument("recipe", type=Path, help="a YAML file with every setting of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument("--gpus", type=whole(1, MOST_PROCESSES), default=1, help="number of GPUs in all (default: 1)")
    parser.add_argument("--rank", type=whole(0, MOST_PROCESSES), default=0, help="which of them (default: 0)")
    parser.add_argument(
        "--stage",
        default="",
        metavar="NAME",
        help="the stage to count, of a run with stages (default: the longest sequences)",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write a Markdown page, with every operation")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    config = load_stage(args.recipe, list(args.overrides), args.stage)
    from launchers.folder.atomic import write_text
    from qwen_moe.tracing.page import facts, markdown, text
    from qwen_moe.tracing.rank import trace_step

    trace = trace_step(config, args.gpus, args.rank)
    if args.page is not None:
        write_text(args.page, markdown(trace, args.recipe.name, f"qwen-moe {shlex.join(args.argv)}"))
    if args.json:
        sys.stdout.write(json.dumps(facts(trace), indent=1) + "\n")
    else:
        sys.stdout.write(text(trace, str(args.recipe)) + "\n")
    return 0
