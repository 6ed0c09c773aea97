"""`qwen-moe data prepare`, `qwen-moe data info` and, from files of their own, `qwen-moe data chat` and `data pairs`."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launchers.counted import counted
from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.data.chat_command import register_chat
from qwen_moe.errors import UserError
from qwen_moe.options import given_prefix, whole


def output_prefix(text: str) -> Path:
    """A prefix of file names. A folder is refused, because the trailing slash would be dropped silently."""
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a prefix of file names, such as {text}data")
    return given_prefix(text)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("data", help="prepare, filter, score and check data for training")
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    prepare = verbs.add_parser(
        "prepare", help="tokenize text, JSONL (.gz, .zst, .bz2, .xz) and directories into .bin/.idx files"
    )
    prepare.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, directories, python-stdlib, or text that is generated: passkey:DOCUMENTS:LONGEST, tasks:KIND:COUNT, "
        "pydoc-questions:COUNT",
    )
    prepare.add_argument(
        "--output", type=output_prefix, required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json"
    )
    which = prepare.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, metavar="DIR", help="an existing tokenizer")
    which.add_argument("--train-tokenizer", action="store_true", help="train one on the input, in PREFIX-tokenizer")
    prepare.add_argument(
        "--vocab-size", type=whole(0, LARGEST_SIZE), help="size of the trained tokenizer, with control tokens"
    )
    prepare.add_argument("--text-key", default="text", help="the key of the text in JSONL")
    prepare.add_argument(
        "--on-bad-utf8",
        choices=("error", "skip", "replace"),
        default="error",
        help="what to do with text that is not Unicode",
    )
    prepare.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="what to do with a JSONL line that is not an object with text under the key",
    )
    prepare.add_argument(
        "--workers", type=whole(0, 4096), default=0, help="number of processes (default: one per core)"
    )
    prepare.add_argument(
        "--overwrite", action="store_true", help="replace an output made from other inputs or settings"
    )
    prepare.add_argument("--json", action="store_true", help="print the result as JSON")
    prepare.set_defaults(func=run_prepare)
    register_chat(verbs, output_prefix)
    info = verbs.add_parser("info", help="describe a .bin/.idx pair")
    info.add_argument("prefix", type=given_prefix, help="the --output of `data prepare` or `data chat`")
    info.add_argument("--check", action="store_true", help="hash both files completely and compare with the manifest")
    info.add_argument("--json", action="store_true", help="print the result as JSON")
    info.set_defaults(func=run_info)


def verbs_of_data(subparsers: Any) -> Any:
    """The verbs of `data`, once it is registered: for one that is defined in a folder above this one."""
    parser = subparsers.choices["data"]
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def run_prepare(args: argparse.Namespace) -> int:
    from qwen_moe.data.corpus import Reading
    from qwen_moe.data.prepare import Request, prepare

    if args.train_tokenizer and args.vocab_size is None:
        raise UserError("--train-tokenizer needs --vocab-size N: give the size of the vocabulary")
    if not args.train_tokenizer and args.vocab_size is not None:
        raise UserError(f"--vocab-size {args.vocab_size} is for a trained tokenizer: leave it out with --tokenizer")
    request = Request(
        inputs=tuple(args.input),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size or 0,
        reading=Reading(text_key=args.text_key, on_bad_utf8=args.on_bad_utf8, on_bad_line=args.on_bad_line),
    )
    prepared, done = prepare(request, args.output, workers=args.workers, overwrite=args.overwrite)
    facts = {"prefix": str(args.output), "done": done} | asdict(prepared)
    if args.json:
        print(json.dumps(facts))
    else:
        verb = "prepared" if done else "already prepared"
        print(
            f"{verb} {args.output}.bin: {counted(prepared.documents, 'document')}, {counted(prepared.tokens, 'token')}"
        )
        print(f"tokenizer {prepared.tokenizer} ({prepared.vocab_size:,} tokens)")
    return 0


def run_info(args: argparse.Namespace) -> int:
    from qwen_moe.data.batches import describe_prefix

    facts = describe_prefix(args.prefix, check=args.check)
    if args.json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        for key, value in facts.items():
            print(f"{key:20s} {value:,}" if isinstance(value, int) else f"{key:20s} {value}")
    return 0
