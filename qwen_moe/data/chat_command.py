"""`qwen-moe data chat`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launchers.counted import counted
from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.data.conversations import PREFERENCE
from qwen_moe.data.manifest import PreparedData
from qwen_moe.errors import UserError
from qwen_moe.options import whole


def register_chat(verbs: Any, output_prefix: Any) -> None:
    """Add the verb to those of `data`. ``output_prefix``: the type of --output."""
    parser = verbs.add_parser("chat", help="tokenize conversations, or pairs of answers, for training on the answers")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="JSONL files, or directories of them")
    parser.add_argument("--output", type=output_prefix, metavar="PREFIX", help="writes PREFIX.bin, .idx and others")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a tokenizer with a chat template")
    parser.add_argument(
        "--learn",
        choices=("assistant", "last", "all"),
        default="assistant",
        help="what is learned: every turn of the assistant, its last turn, or all tokens",
    )
    parser.add_argument(
        "--length", type=whole(1, LARGEST_SIZE), help="the most tokens of a conversation, or of both answers of a pair"
    )
    parser.add_argument(
        "--too-long",
        choices=("error", "drop", "cut"),
        default="error",
        help="what to do with a conversation that is longer: stop, leave it out, or cut its end off",
    )
    parser.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error", help="what to do with rows that cannot be used"
    )
    parser.add_argument(
        "--preview", type=whole(1, 1000), metavar="N", help="print N examples; what is learned is marked"
    )
    parser.add_argument("--workers", type=whole(0, 4096), default=0, help="number of processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from other inputs or settings")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run_chat)


def run_chat(args: argparse.Namespace) -> int:
    from qwen_moe.data.chat_rows import Rules
    from qwen_moe.data.prepare_chat import chat_request, prepare_chat
    from qwen_moe.data.preview import preview

    if args.output is None and args.preview is None:
        raise UserError("there is nothing to do: give --output PREFIX, or --preview N to look at examples")
    if args.json and args.preview is not None:
        raise UserError("--json prints one object, and --preview prints examples: give one of them")
    rules = Rules(tokenizer=args.tokenizer, learn=args.learn, length=args.length or 0, too_long=args.too_long)
    request = chat_request(tuple(args.input), rules, args.on_bad_line)
    if args.preview is not None:
        preview(request, args.preview)
    if args.output is None:
        return 0
    prepared, done = prepare_chat(request, args.output, workers=args.workers, overwrite=args.overwrite)
    if args.json:
        print(json.dumps({"prefix": str(args.output), "done": done} | asdict(prepared)))
    else:
        print(f"{'prepared' if done else 'already prepared'} {args.output}.bin: {_described(prepared)}")
    return 0


def _described(prepared: PreparedData) -> str:
    counts = prepared.counts
    one = "pair" if prepared.kind == "pairs" else "conversation"
    text = (
        f"{counted(counts[f'{one}s'], one)}, {counted(prepared.tokens, 'token')}, {counts['learned_tokens']:,} of them "
        "learned"
    )
    text += f", the longest {counts['longest']:,}"
    if set(prepared.criteria) - {PREFERENCE}:
        text += "; judged by " + ", ".join(f"{name} ({count:,})" for name, count in prepared.criteria.items())
    if counts["truncated"]:
        text += f"; {counts['truncated']:,} truncated by {counted(counts['cut_tokens'], 'token')}"
        text += f", {counts['cut_learned_tokens']:,} of them learned"
    return text + (f"; {counted(prepared.skipped, 'row')} left out" if prepared.skipped else "")
