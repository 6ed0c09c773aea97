"""The `qwen-moe` command: one verb per capability, each defined beside its implementation."""

import argparse
import contextlib
import os
import sys
import traceback
from importlib import import_module

from qwen_moe import __version__
from qwen_moe.errors import UserError, explain_failure
from qwen_moe.options import Parser
from qwen_moe.packages import check_installed

# Modules with a `register(subparsers)`. They import nothing heavy at the top, so that --help is quick. A verb that needs
# packages of an extra lists them in its parser's default ``needs``.
VERBS = (
    "qwen_moe.training.command",
    "qwen_moe.runs.report",
    "qwen_moe.verify.command",
    "qwen_moe.info",
    "qwen_moe.data.command",
    "qwen_moe.checkpoint.huggingface.command",
    "qwen_moe.generation.command",
    "qwen_moe.scoring.command",
    "qwen_moe.rollout.command",
    "qwen_moe.curation.leaks.command",
    "qwen_moe.curation.scores.command",
    "qwen_moe.curation.command",
    "qwen_moe.evaluation.command",
    "qwen_moe.scaling",
    "qwen_moe.workflow.command",
    "qwen_moe.posttraining.command",
    "qwen_moe.launch.command",
    "qwen_moe.launch.observe",
    "qwen_moe.planning.command",
    "qwen_moe.tracing.command",
)
# Verbs that compute in this process. Commands that start several processes choose their threads (`parallel.threads`): of
# these verbs, those whose parser's default ``may_split`` says so.
ONE_PROCESS = ("evaluate", "score", "convert", "verify", "report")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-moe", description="Train Qwen Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.set_defaults(build_parser=build_parser)  # `pipeline` runs other verbs
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in VERBS:
        import_module(module).register(subparsers)
    return parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes overrides from one block of arguments only; here they may also follow options.
    if rest and hasattr(args, "overrides") and all("=" in item and not item.startswith("-") for item in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns its exit code, 2 for an error that the user can fix, or 130 when interrupted.

    An error of the user or the machine is printed as one line. Any other exception is a bug of ours and keeps its traceback.
    """
    from launchers.errors import LaunchError
    from scaling_laws.errors import InputError

    args = None
    try:
        args = _parse(argv)
        args.argv = sys.argv[1:] if argv is None else argv
        verb = " ".join(filter(None, (args.verb, getattr(args, "scaling_verb", ""))))
        check_installed(f"qwen-moe {verb}", *getattr(args, "needs", ()))
        if getattr(args, "verb", "") in ONE_PROCESS and not getattr(args, "may_split", False):
            from parallel.threads import limit_threads

            limit_threads()
        code = (getattr(args, "func", None) or args.run)(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `qwen-moe ... | head`: the reader has closed the pipe. Discard what Python would still write at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = str(error) if isinstance(error, (UserError, LaunchError, InputError)) else explain_failure(error)
        if message is None:
            raise
        if args is not None and args.traceback:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
