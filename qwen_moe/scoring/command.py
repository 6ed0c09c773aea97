"""`qwen-moe score`: scores of conversations and pairs by a reward model. Torch is imported only when it is used."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted
from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.errors import UserError
from qwen_moe.generation.command import DTYPES
from qwen_moe.options import whole
from qwen_moe.progress import style

if TYPE_CHECKING:
    from qwen_moe.scoring.model import ScoringModel
    from qwen_moe.scoring.rows import ScoredRow


def register(subparsers: Any) -> None:
    """Add `score` to the command's subparsers; ``args.func(args)`` returns the exit code."""
    parser = subparsers.add_parser("score", help="score conversations, or pairs of answers, with a reward model")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a reward model: a checkpoint, a run directory (its newest checkpoint) or a Hugging Face directory",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="JSONL",
        help="lines with messages; prompt and completion; or prompt, chosen and rejected",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="JSONL",
        help="the lines with their scores; the same command goes on after a stop",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME=NUMBER,...",
        help="how much each criterion counts in the weighted score; default: as the model was trained, or all the same",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="of pairs: draw how often the model is right, by how sure it is"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored, or the run's compute dtype")
    parser.add_argument(
        "--batch-tokens",
        type=whole(1, LARGEST_SIZE),
        default=16384,
        metavar="N",
        help="tokens that are read at once; with 1, each conversation by itself, whose scores then have the same bits "
        "whatever else is in the file; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from qwen_moe.data.chat import Chat
    from qwen_moe.generation.prompts import Answers
    from qwen_moe.generation.tokenizer import tokenizer_folder
    from qwen_moe.packages import check_installed
    from qwen_moe.scoring.model import ScoringModel, check_tokens, open_reward_model
    from qwen_moe.scoring.rows import read_rows

    opened = open_reward_model(args.checkpoint)
    config = opened.config
    given = parse_weights(args.weights, config.criteria)
    if args.plot is not None:
        check_installed("--plot", "matplotlib", otherwise="leave --plot out")
        if not args.plot.absolute().parent.is_dir():
            raise UserError(f"--plot {args.plot}: the folder {args.plot.parent} does not exist: make it first")
    chat = Chat(tokenizer_folder(opened.directory))
    rows = read_rows(
        args.input, chat, lambda tokens, what: check_tokens(tokens, config.vocab_size, config.trainable_length, what)
    )
    if args.plot is not None and not any(len(row.tokens) == 2 for row in rows):
        raise UserError(f"--plot draws how the scores of pairs agree with judgments, and {args.input} has no pairs")
    settings = {
        "checkpoint": str(opened.directory),
        "rows": _digest(rows),
        "weights": args.weights,
        "dtype": args.dtype,
    }
    with Answers(args.output, settings) as answers:
        todo = [index for index in range(len(rows)) if index not in answers.done]
        if len(todo) < len(rows):
            print(
                f"{args.output}: {len(rows) - len(todo)} of {counted(len(rows), 'row has', 'rows have')} their scores "
                "already",
                file=sys.stderr,
            )
        if todo:
            model = ScoringModel.load(args.checkpoint, dtype=args.dtype, batch_tokens=args.batch_tokens)
            _score(model if given is None else model.weighted_by(given), rows, todo, answers)
        _report(args, config.criteria, rows, answers)
    return 0


def parse_weights(text: str | None, criteria: tuple[str, ...]) -> tuple[float, ...] | None:
    """The weights of ``--weights``, for all ``criteria``. Raises UserError."""
    if text is None:
        return None
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = item.rpartition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise UserError(f"--weights: {item!r} is not NAME=NUMBER, such as helpful=2") from None
    if set(found) != set(criteria):
        raise UserError(
            f"--weights names {', '.join(found)}, but the model scores by {', '.join(criteria)}: name these"
        )
    if not all(0 <= value < float("inf") for value in found.values()) or not any(found.values()):
        raise UserError(f"--weights {text}: give numbers of at least 0, not all of them 0")
    return tuple(found[name] for name in criteria)


def _digest(rows: list["ScoredRow"]) -> str:
    """A hash of rows, which tells whether a file has changed."""
    import hashlib

    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.values, row.tokens]).encode())
    return found.hexdigest()[:16]


def _score(model: "ScoringModel", rows: list["ScoredRow"], todo: list[int], answers: Any) -> None:
    """Score the rows ``todo``; each is written as soon as all its conversations have their scores."""
    import torch
    from tqdm import tqdm

    from qwen_moe.scoring.rows import ANSWERS, by_criterion

    owners = [(index, part) for index in todo for part in range(len(rows[index].tokens))]
    conversations = [rows[index].tokens[part] for index, part in owners]
    waiting: dict[int, list[torch.Tensor]] = {}
    total = sum(map(len, conversations))
    with tqdm(total=total, unit="token", unit_scale=True, desc="scoring", delay=1.0, **style()) as bar:

        def done(number: int, scores: torch.Tensor) -> None:
            index, _ = owners[number]
            row, parts = rows[index], waiting.setdefault(index, [])
            parts.append(scores)
            bar.update(len(conversations[number]))
            if len(parts) < len(row.tokens):
                return
            by_name = [by_criterion(model.criteria, one.tolist()) for one in parts]
            weighted = [float(model.weighted(one)) for one in parts]
            pair = len(parts) == 2
            found = {
                "scores": dict(zip(ANSWERS, by_name, strict=True)) if pair else by_name[0],
                "score": dict(zip(ANSWERS, weighted, strict=True)) if pair else weighted[0],
            }
            answers.add(index, {**row.values, **found})
            del waiting[index]

        model.scores(conversations, done)


def _report(args: argparse.Namespace, criteria: tuple[str, ...], rows: list["ScoredRow"], answers: Any) -> None:
    from qwen_moe.scoring.picture import draw
    from qwen_moe.scoring.rows import ANSWERS
    from qwen_moe.scoring.summary import WEIGHTED, agreements, by_kind, kinds_table, table

    pairs, kinds = [], []
    for row, scored in zip(rows, answers.rows, strict=True):
        if len(row.tokens) == 2:
            first, second = (scored["scores"][name] | {WEIGHTED: scored["score"][name]} for name in ANSWERS)
            pairs.append((row.judged, first, second))
            kinds.append(row.values.get("kind"))
    found, of_kinds = agreements(criteria, pairs), by_kind(criteria, pairs, kinds)
    summary = {"output": str(args.output), "rows": len(rows), "pairs": len(pairs), "criteria": list(criteria)}
    if args.plot is not None and found:
        draw(found, args.plot)
        summary["plot"] = str(args.plot)
    answers.finish()
    if args.json:
        summary["agreement"] = {name: one.figures() for name, one in found.items()}
        summary["agreement_by_kind"] = {
            kind: {name: one.figures() for name, one in of.items()} for kind, of in of_kinds.items()
        }
        print(json.dumps(summary))
        return
    print(f"{args.output}: scores of {counted(len(rows), 'row')} by {', '.join(criteria)}")
    if found:
        print(table(found))
        if of_kinds:
            print(kinds_table(of_kinds))
    elif pairs:
        print("no pair was judged by these criteria")
    if args.plot is not None and found:
        print(args.plot)
