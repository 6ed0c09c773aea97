"""`qwen-moe evaluate passkey` and `qwen-moe evaluate ruler`; `tasks` is in `harness.command`."""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_moe.config.fields import LARGEST, LARGEST_SIZE
from qwen_moe.evaluation.harness.command import register_tasks
from qwen_moe.generation.command import add_attention, add_checkpoint, reading_of
from qwen_moe.options import whole

EXTENSIONS = ("none", "yarn", "dca", "auto", "plain")
MOST_PROMPTS = 10_000_000


def _lengths(text: str) -> tuple[int, ...]:
    """An option type: numbers of tokens with commas between them; the result is in ascending order."""
    found = [whole(1, LARGEST_SIZE)(part.strip()) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: a length is given twice: leave one out")
    return tuple(sorted(found))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _shard(text: str) -> tuple[int, int]:
    """An option type: `0/4` is the first of four."""
    index, _, count = text.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected INDEX/COUNT, such as 0/4")
    if int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"{text!r}: the index counts from 0 and must be less than {count}")
    return int(index), int(count)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("evaluate", help="measure how well a model reads long texts and solves tasks")
    verbs = parser.add_subparsers(dest="evaluate_verb", required=True, metavar="VERB")
    passkey = verbs.add_parser("passkey", help="find a number that is hidden in noise, at several lengths and depths")
    _add_common(passkey, _run_passkey, 1, "for each length and depth")
    passkey.add_argument(
        "--depths", type=whole(1, 1000), default=10, metavar="N", help="equally spaced; default: %(default)s"
    )
    passkey.add_argument(
        "--digits", type=whole(1, 100), default=5, metavar="N", help="of the key; default: %(default)s"
    )
    ruler = verbs.add_parser("ruler", help="the tasks of RULER (arXiv 2404.06654)")
    _add_common(ruler, _run_ruler, 20, "for each task and length")
    ruler.add_argument("--tasks", type=_names, metavar="NAME,...", help="default: all that need no file")
    ruler.add_argument(
        "--essay", type=Path, metavar="FILE", help="running text for haystacks; default: Python's own help topics"
    )
    ruler.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD's dev-v2.0.json, for qa_1")
    ruler.add_argument("--hotpot", type=Path, metavar="FILE", help="hotpot_dev_distractor_v1.json, for qa_2")
    register_tasks(verbs)


def _add_common(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], samples: int, each: str
) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--lengths",
        type=_lengths,
        required=True,
        metavar="N,...",
        help="tokens of prompt and completion, such as 4096,32768",
    )
    parser.add_argument(
        "--samples",
        type=whole(1, MOST_PROMPTS),
        default=samples,
        metavar="N",
        help=f"prompts {each}; default: %(default)s",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: evaluation/VERB-NAME; the same command continues there"
    )
    parser.add_argument("--seed", type=whole(0, LARGEST), default=0, help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32", "fp64"), help="default: as stored, or the run's compute dtype"
    )
    parser.add_argument(
        "--context-extension",
        choices=EXTENSIONS,
        default="auto",
        help="at lengths that the model does not reach: YaRN, dual chunk attention (auto too), or no change, to see it fail "
        "(plain); default: %(default)s",
    )
    add_attention(parser)
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="complete every Nth prompt only, so that N processes share --output",
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")
    parser.set_defaults(func=run, compile=False)


def _run_passkey(args: argparse.Namespace) -> int:
    from qwen_moe.evaluation.plan import depths
    from qwen_moe.evaluation.tasks.passkey import passkey_task

    completer = _completer(args)
    task = passkey_task(args.digits, completer.encode)
    asked = {"depths": args.depths, "digits": args.digits}
    return _run(args, completer, {task.name: task}, depths(args.depths), asked)


def _run_ruler(args: argparse.Namespace) -> int:
    from qwen_moe.evaluation.tasks.haystack import read_essay
    from qwen_moe.evaluation.tasks.ruler import chosen, ruler_tasks

    files = {"qa_1": args.squad, "qa_2": args.hotpot}
    names = chosen(args.tasks, files)
    essay = read_essay(args.essay)
    tasks = ruler_tasks(names, essay, files, args.samples)
    asked: dict[str, Any] = {"tasks": names, "essay": essay.source, "essay_sha256": essay.sha256}
    asked |= {name: _content(path) for name, path in files.items() if path is not None}
    return _run(args, _completer(args), tasks, (None,), asked)


def _content(path: Path) -> dict[str, str]:
    """What answers depend on of a file that a user gives."""
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _completer(args: argparse.Namespace) -> Any:
    from qwen_moe.evaluation.model import CompleterOptions, open_completer

    options = CompleterOptions(
        dtype=args.dtype,
        context_extension=args.context_extension,
        chunk_size=args.chunk_size,
        attention=args.attention,
        kept_share=args.kept_share,
    )
    return open_completer(args.checkpoint, options)


def _run(
    args: argparse.Namespace,
    completer: Any,
    tasks: dict[str, Any],
    depths: tuple[float | None, ...],
    asked: dict[str, Any],
) -> int:
    from qwen_moe.evaluation.picture import draw_if_possible
    from qwen_moe.evaluation.plan import Evaluation
    from qwen_moe.evaluation.results import RESULTS, as_text
    from qwen_moe.evaluation.run import run_evaluation

    kind = args.evaluate_verb
    settings = {
        "kind": kind,
        "lengths": list(args.lengths),
        "samples": args.samples,
        "seed": args.seed,
        "dtype": args.dtype,
        **reading_of(args),
    }
    evaluation = Evaluation(
        kind=kind,
        tasks=tasks,
        lengths=args.lengths,
        depths=depths,
        samples=args.samples,
        seed=args.seed,
        asked=settings | asked,
    )
    output = args.output or Path("evaluation") / f"{kind}-{args.checkpoint.resolve().name}"
    results = run_evaluation(evaluation, completer, output, shard=args.shard, progress=True)
    if results is None:
        others = f"shard {args.shard[0]} of {args.shard[1]} is done; the last to end writes {output / RESULTS}"
        print(json.dumps({"done": False, "output": str(output)}) if args.json else others)
        return 0
    picture = draw_if_possible(results, output)
    if args.json:
        print(json.dumps(results))
    else:
        print(as_text(results))
        print(f"written: {output / RESULTS}" + (f", {picture}" if picture else ""))
    return 0
