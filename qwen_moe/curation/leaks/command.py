"""`qwen-moe data decontaminate`. Nothing heavy is imported before it is used."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted
from qwen_moe.data.command import verbs_of_data
from qwen_moe.errors import UserError
from qwen_moe.options import whole

if TYPE_CHECKING:
    from qwen_moe.curation.leaks.settings import LeakSettings

_MEGABYTE = 1_000_000


def register(subparsers: Any) -> None:
    """Add `decontaminate` to the verbs of `data`."""
    parser = verbs_of_data(subparsers).add_parser(
        "decontaminate", help="leave out documents, conversations, pairs and queries that contain a test"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files (JSONL, Parquet, text; packed or not) or directories of them",
    )
    parser.add_argument("--against", nargs="+", required=True, metavar="PATH", help="test sets, in the same formats")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder of kept and dropped rows")
    parser.add_argument(
        "--report", type=Path, metavar="HTML", help="the page of leaks; figures go beside it; default: DIR/leaks.html"
    )
    parser.add_argument(
        "--rule",
        choices=("windowed", "close", "report"),
        default="windowed",
        help="compare windows of twice the length of the shorter text; ask in addition that at most a fifth of it is "
        "changed; or compare whole documents as the Qwen2.5 report does, which removes many long documents by chance; "
        "default: %(default)s",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="compare its tokens; default: words")
    parser.add_argument(
        "--complete",
        action="store_true",
        help="lose no leak that is changed by more than a fifth; about ten times slower",
    )
    parser.add_argument("--text-key", default="text", help="the key of a document's text; default: %(default)s")
    parser.add_argument(
        "--test-key", metavar="KEY,...", help="the keys of a test's text; default: --text-key, or the messages"
    )
    parser.add_argument(
        "--on-short", choices=("error", "skip"), default="error", help="what to do with tests of fewer than 13 tokens"
    )
    parser.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error", help="what to do with rows that cannot be read"
    )
    parser.add_argument(
        "--shard-size",
        type=whole(1, 1_000_000),
        default=256,
        metavar="MB",
        help="input of each output file; what is lost if the command is killed; default: %(default)s",
    )
    parser.add_argument("--workers", type=whole(0, 4096), default=0, help="number of processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from other inputs or settings")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=_run)


def _settings(args: argparse.Namespace) -> "LeakSettings":
    """The options as settings. Raises UserError for values that cannot be."""
    from pydantic import ValidationError

    from qwen_moe.config.load import explain
    from qwen_moe.curation.leaks.settings import LeakSettings

    keys = tuple(args.test_key.split(",")) if args.test_key is not None else ()
    if not all(keys):
        raise UserError(f"--test-key {args.test_key!r} has an empty name: give keys with commas between them")
    try:
        return LeakSettings(
            against=tuple(args.against),
            rule=args.rule,
            tokenizer=args.tokenizer,
            text_key=args.text_key,
            test_keys=keys,
            complete=args.complete,
            on_short=args.on_short,
            on_bad_line=args.on_bad_line,
        )
    except ValidationError as error:
        raise explain(error, "data decontaminate", whole=LeakSettings) from None


def _run(args: argparse.Namespace) -> int:
    from qwen_moe.curation.leaks.report import check_report, cost, figures, write_report
    from qwen_moe.curation.leaks.run import Request, decontaminate

    report = args.report or args.output / "leaks.html"
    check_report(report)
    settings = _settings(args)
    request = Request(inputs=tuple(args.input), settings=settings, shard_bytes=args.shard_size * _MEGABYTE)
    record, done = decontaminate(request, args.output, workers=args.workers, overwrite=args.overwrite)
    write_report(report, args.output, record)
    found = figures(record)
    if args.json:
        print(json.dumps({"output": str(args.output), "report": str(report), "done": done} | found))
        return 0
    counts = found["counts"]
    print(
        f"{'checked' if done else 'already checked'}: {counts['dropped']:,} of {counted(counts['rows'], 'document')} "
        "dropped"
    )
    for name, one in found["tests"].items():
        print(
            f"{name}: {one['leaked_sequences']:,} of {counted(one['sequences'], 'test')} found, documents: "
            f"{one['documents']:,}"
        )
    if counts["bad"]:
        print(f"left out: {'; '.join(found['bad'])}", file=sys.stderr)
    if said := cost(found):
        print(said)
    print(f"output {args.output}, report {report}")
    return 0
