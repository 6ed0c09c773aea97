"""`qwen-moe data pairs`. Nothing heavy is imported before it is used."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.options import number, whole


def register_pairs(verbs: Any, output_prefix: Any) -> None:
    """Add the verb to those of `data`. ``output_prefix``: the type of --output."""
    parser = verbs.add_parser("pairs", help="make pairs of a chosen and a rejected answer from rollouts, for DPO")
    parser.add_argument("rollouts", type=Path, metavar="ROLLOUTS", help="a folder that `qwen-moe rollout` wrote")
    parser.add_argument(
        "--output", type=output_prefix, required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json"
    )
    parser.add_argument(
        "--rule",
        choices=("best-worst", "pass-fail", "all"),
        default="best-worst",
        help="the highest reward with the lowest; answers that pass with answers that fail; all pairs of different rewards. "
        "Default: %(default)s",
    )
    parser.add_argument(
        "--per-query",
        type=whole(0, 1_000_000),
        metavar="N",
        help="the most pairs of a query, 0 for all; default: 1, and with --rule all 0",
    )
    parser.add_argument(
        "--passing", type=number(), default=1.0, metavar="R", help="the least reward that passes; default: %(default)s"
    )
    parser.add_argument(
        "--truncated",
        choices=("drop", "rejected"),
        default="drop",
        help="leave out answers that ended at their limit of tokens, or let them be rejected; default: %(default)s",
    )
    parser.add_argument(
        "--length", type=whole(1, LARGEST_SIZE), help="leave out pairs that have more tokens, both answers together"
    )
    parser.add_argument("--seed", type=whole(), default=0, help="of pairs that are drawn; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from other inputs or settings")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from qwen_moe.rollout.pairs import PairRules
    from qwen_moe.rollout.pairs_data import PairsRequest, described, prepare_pairs

    per_query = args.per_query if args.per_query is not None else int(args.rule != "all")
    rules = PairRules(
        rule=args.rule, per_query=per_query, passing=args.passing, truncated=args.truncated, seed=args.seed
    )
    request = PairsRequest(rollouts=args.rollouts, rules=rules, length=args.length or 0)
    prepared, done = prepare_pairs(request, args.output, overwrite=args.overwrite)
    if args.json:
        print(json.dumps({"prefix": str(args.output), "done": done} | asdict(prepared)))
    else:
        print(f"{'prepared' if done else 'already prepared'} {args.output}.bin: {described(prepared)}")
    return 0
