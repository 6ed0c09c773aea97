"""`qwen-moe rollout`: samples answers to queries and rewards them. Torch is imported only when it is used."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qwen_moe.data.command import output_prefix, verbs_of_data
from qwen_moe.errors import UserError
from qwen_moe.generation.command import add_checkpoint, add_reading, add_sampling, sampling_of
from qwen_moe.options import number, whole
from qwen_moe.rollout.pairs_command import register_pairs


def register(subparsers: Any) -> None:
    """Add `rollout` to the command's subparsers, and `pairs` to those of `data`."""
    register_pairs(verbs_of_data(subparsers), output_prefix)
    parser = subparsers.add_parser("rollout", help="sample answers to queries and reward them, for post-training")
    add_checkpoint(parser)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="JSONL",
        help='lines with "prompt", "messages" or "tokens", and what the reward needs',
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a folder; the same command goes on after a stop"
    )
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template to the prompts")
    _add_rewards(parser)
    add_sampling(parser)
    add_reading(parser)
    _add_server(parser)
    parser.set_defaults(samples=8, temperature=1.0, top_p=1.0)  # what training on the samples assumes
    parser.add_argument(
        "--queries-per-file",
        type=whole(1, 1_000_000),
        metavar="N",
        help="queries that are sampled together; a kill loses no more. Default: four batches of answers",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(func=_run)


def _add_rewards(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rewards")
    group.add_argument(
        "--reward",
        nargs="+",
        required=True,
        metavar="SPEC",
        help="exact, contains, number, math, format:REGEX, python, or MODULE:FUNCTION of (prompt, completion, row)",
    )
    group.add_argument(
        "--reward-weights", nargs="+", type=number(), default=[], metavar="W", help="one for each reward; default: 1"
    )
    group.add_argument(
        "--on-reward-failure",
        choices=("error", "zero"),
        default="error",
        help="if a reward hangs, throws or returns no finite number: stop, or count it as 0; default: %(default)s",
    )
    group.add_argument(
        "--reward-seconds", type=number(above=0), default=10.0, metavar="S", help="for one answer; default: %(default)s"
    )
    group.add_argument(
        "--reward-memory",
        type=whole(64, 1 << 30),
        default=4096,
        metavar="MIB",
        help="address space of each process; default: %(default)s",
    )
    group.add_argument("--reward-workers", type=whole(0, 4096), default=0, help="processes; default: one per core")


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling from a server", "--checkpoint is then a copy of what it serves")
    group.add_argument("--server", metavar="URL", help="a vLLM or SGLang server, such as http://127.0.0.1:8000")
    group.add_argument("--model", metavar="NAME", help="the name under which it serves the model")
    group.add_argument("--server-kind", choices=("vllm", "sglang"), default="vllm", help="default: %(default)s")
    group.add_argument(
        "--server-seconds",
        type=number(above=0),
        default=600.0,
        metavar="S",
        help="to wait for an answer; default: %(default)s",
    )
    group.add_argument(
        "--server-tries", type=whole(1, 1000), default=6, metavar="N", help="tries of a request; default: %(default)s"
    )
    group.add_argument(
        "--server-key-variable",
        default="",
        metavar="NAME",
        help="the environment variable with the API key, for a server that asks for one (--api-key of vLLM and SGLang)",
    )
    group.add_argument(
        "--server-check",
        type=whole(0, 1000),
        default=8,
        metavar="N",
        help="answers whose log-probabilities are compared with the checkpoint's before sampling, which reads its weights; "
        "0: none; default: %(default)s",
    )
    group.add_argument(
        "--server-gap",
        type=number(above=0),
        default=0.1,
        metavar="NATS",
        help="mean difference per token above which the server has other weights; default: %(default)s",
    )


def _check_server(args: argparse.Namespace) -> None:
    if (args.server is None) != (args.model is None):
        raise UserError("--server and --model belong together: an address, and the name of the model that it serves")
    if args.server is not None and args.tp * args.ep * args.pp > 1:
        raise UserError("--tp, --ep and --pp are of a model that is sampled here: leave them out with --server")


def _run(args: argparse.Namespace) -> int:
    from qwen_moe.rollout.rewards import RewardSettings

    _check_server(args)
    sampling = sampling_of(args)
    rewards = RewardSettings(
        rewards=tuple(args.reward),
        weights=tuple(args.reward_weights),
        on_failure=args.on_reward_failure,
        seconds=args.reward_seconds,
        memory_mib=args.reward_memory,
        workers=args.reward_workers,
    )
    from qwen_moe.generation.launch import in_session

    return in_session(args, lambda session: _roll_out(args, session, sampling, rewards))


def _roll_out(args: argparse.Namespace, session: Any, sampling: Any, rewards: Any) -> int:
    from qwen_moe.rollout.run import roll_out
    from qwen_moe.rollout.summary import described

    summary = roll_out(args, session, sampling, rewards)
    if summary is not None:
        print(json.dumps(summary) if args.json else f"{args.output}: {described(summary)}")
        for line in session.notes():
            print(line, file=sys.stderr)
    return 0
