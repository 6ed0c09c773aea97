"""`qwen-moe generate`: continues prompts with a checkpoint, run or Hugging Face directory. Torch is imported only when it is
used."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted
from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.errors import UserError
from qwen_moe.options import number, whole

if TYPE_CHECKING:
    from qwen_moe.generation.sampling import Sampling

DTYPES = ("bf16", "fp16", "fp32", "fp64")
EXTENSIONS = ("none", "yarn", "dca", "auto")
ATTENTION = ("dense", "sparse")


def register(subparsers: Any) -> None:
    """Add `generate` to the command's subparsers; ``args.func(args)`` returns the exit code."""
    parser = subparsers.add_parser("generate", help="continue texts with a checkpoint or Hugging Face directory")
    add_checkpoint(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT")
    given.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file; only the answer is printed")
    given.add_argument(
        "--input", type=Path, metavar="JSONL", help='lines with "prompt", "messages" or "tokens"; needs --output'
    )
    parser.add_argument(
        "--output", type=Path, metavar="JSONL", help="the answers to --input; the same command goes on after a stop"
    )
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template to the prompts")
    add_sampling(parser)
    add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(func=_run)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of what is drawn; `sampling_of` reads them."""

    def option(name: str, kind: Any, default: Any, metavar: str, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text}; default: %(default)s")

    option("--max-new-tokens", whole(1, LARGEST_SIZE), 128, "N", "tokens of an answer, at most")
    option("--temperature", number(least=0), 0.7, "T", "0 is greedy")
    option("--top-p", number(above=0, most=1), 0.8, "P", "nucleus sampling")
    option("--top-k", whole(0, LARGEST_SIZE), 0, "K", "the K most likely tokens, 0 for all")
    option("--min-p", number(least=0, most=1), 0.0, "P", "tokens at least this share as likely as the most likely one")
    option("--repetition-penalty", number(above=0), 1.0, "R", "above 1, tokens that occurred become less likely")
    option("--samples", whole(1, 100_000), 1, "N", "answers per prompt, which share its cache")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    parser.add_argument("--seed", type=whole(), default=0, help="default: %(default)s")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options of how the model reads, and over how many processes it is split."""
    parser.add_argument(
        "--context-extension",
        choices=EXTENSIONS,
        default="none",
        help="for texts longer than the model was trained on: YaRN, dual chunk attention, or the latter where needed (auto)",
    )
    add_attention(parser)
    add_running(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile what a layer does with new tokens: up to twice as fast on a CPU, after some seconds",
    )


def add_running(parser: Any) -> None:
    """Options of how the model computes: `add_reading` without how it reads long texts."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored, or the run's compute dtype")
    parser.add_argument(
        "--batch-size", type=whole(1, 100_000), default=64, metavar="N", help="answers at a time; default: %(default)s"
    )
    for degree, what in (("tp", "tensor"), ("ep", "expert"), ("pp", "pipeline")):
        parser.add_argument(
            f"--{degree}", type=whole(1, 4096), default=1, help=f"processes of {what} parallelism; default: 1"
        )


def add_checkpoint(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=required,
        metavar="DIR",
        help="a checkpoint, a run directory (its newest checkpoint) or a Hugging Face directory",
    )


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Options of which keys of a long prompt are read, and at which distances."""
    parser.add_argument(
        "--chunk-size",
        type=whole(2, LARGEST_SIZE),
        metavar="N",
        help="tokens of a chunk of dual chunk attention; default: three quarters of the trained length",
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        default="dense",
        help="sparse leaves out keys in prompts of 32,768 tokens or more; default: %(default)s",
    )
    parser.add_argument(
        "--kept-share",
        type=number(above=0, most=1),
        metavar="SHARE",
        help="least share of a head's attention that sparse attention keeps, in the mean over queries; default: 0.95",
    )


def reading_of(args: argparse.Namespace) -> dict[str, Any]:
    """How prompts are read, as files of answers record it."""
    reading = {name: getattr(args, name) for name in ("context_extension", "chunk_size", "attention")}
    if args.kept_share is not None:
        reading["kept_share"] = args.kept_share
    if args.compile:
        reading["compile"] = True
    return reading


def sampling_of(args: argparse.Namespace) -> "Sampling":
    from qwen_moe.generation.sampling import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        samples=args.samples,
        stop=tuple(args.stop),
        seed=args.seed,
    )


def _run(args: argparse.Namespace) -> int:
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output belong together: a file of prompts and the file that gets the answers")
    sampling = sampling_of(args)
    from qwen_moe.generation.launch import in_session

    return in_session(args, lambda session: (_many if args.input else _one)(args, session, sampling))


def _one(args: argparse.Namespace, session: Any, sampling: "Sampling") -> int:
    from qwen_moe.documents import read_text
    from qwen_moe.generation.text import Continuation, answer_text
    from qwen_moe.generation.tokenizer import chat_tokens, text_tokens

    opened, prompt = session.opened, args.prompt
    if args.prompt_file is not None:
        prompt = read_text(args.prompt_file, "--prompt-file", "a text file")
    if args.chat:
        tokens = chat_tokens(opened.tokenizer, [{"role": "user", "content": prompt}])
    else:
        tokens = text_tokens(opened.tokenizer, prompt)
    session.say_if_no_chat(args.chat, [{"prompt": prompt}])
    session.check([tokens], sampling.max_new_tokens)
    begin = time.perf_counter()
    (answers,) = session.generate([tokens], sampling)
    seconds = time.perf_counter() - begin
    found = [
        Continuation(
            prompt=prompt,
            completion=answer_text(opened, answer, sampling.stop),
            prompt_tokens=len(tokens),
            new_tokens=len(answer.tokens),
            finish_reason=answer.finish_reason,
            dtype=session.dtype,
            seconds=seconds,
        )
        for answer in answers
    ]
    if not session.reports:
        return 0
    if args.json:
        print(json.dumps([vars(one) for one in found] if len(found) > 1 else vars(found[0])))
        return 0
    for one in found:
        print(one.completion if args.chat or args.prompt_file else prompt + one.completion)
    drawn = sum(one.new_tokens for one in found)
    print(f"{counted(drawn, 'token')}, {drawn / max(seconds, 1e-9):.1f} per second, {session.dtype}", file=sys.stderr)
    for line in session.notes():
        print(line, file=sys.stderr)
    return 0


def _many(args: argparse.Namespace, session: Any, sampling: "Sampling") -> int:
    from qwen_moe.generation.prompts import Answers, digest, read_prompts
    from qwen_moe.generation.text import answer_text

    opened = session.opened
    rows = read_prompts(args.input, opened.tokenizer, args.chat)
    session.say_if_no_chat(args.chat, (row.values for row in rows))
    session.check([row.tokens for row in rows], sampling.max_new_tokens)
    settings = {
        "checkpoint": str(opened.weights.directory),
        "prompts": digest(rows),
        "sampling": {**vars(sampling), "stop": list(sampling.stop)},
        "dtype": args.dtype,
        **reading_of(args),
    }
    with Answers(args.output, settings, writes=session.reports) as answers:
        todo = session.agree([index for index in range(len(rows)) if index not in answers.done])
        if len(todo) < len(rows):
            session.say(
                f"{args.output}: {len(rows) - len(todo)} of {counted(len(rows), 'prompt has', 'prompts have')} their "
                "answers already"
            )

        def done(index: int, completions: list[Any]) -> None:
            made = [
                {
                    "text": answer_text(opened, answer, sampling.stop),
                    "finish_reason": answer.finish_reason,
                    "tokens": answer.tokens,
                    "log_probs": answer.log_probs,
                }
                for answer in completions
            ]
            answers.add(index, {**rows[index].values, "completions": made})

        session.generate([rows[index].tokens for index in todo], sampling, numbers=todo, done=done)
        if session.reports:
            answers.finish()
            summary = {"output": str(args.output), "prompts": len(rows), "answered_now": len(todo)}
            print(json.dumps(summary) if args.json else f"{args.output}: answers to {counted(len(rows), 'prompt')}")
            for line in session.notes():
                print(line, file=sys.stderr)
    return 0
