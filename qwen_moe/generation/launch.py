"""Starts the ranks of `qwen-moe generate --tp ...` on this machine: the same command in several processes."""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.counted import counted
from parallel.elastic import one_machine
from parallel.gpus import visible_gpus
from parallel.heap import heap_environment
from parallel.mesh import Layout, LayoutError, layout_for, smallest_world
from parallel.threads import choose_threads, limit_threads
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError

if TYPE_CHECKING:
    from qwen_moe.generation.session import Session

USER_ERROR = 2
_FAILURE = "QWEN_MOE_GENERATION_FAILURE"  # the file for the message of the first rank that fails


def report_failure(error: UserError) -> None:
    """In a rank that `start_ranks` started, hand its message over, unless another rank has. Elsewhere raise it."""
    path = os.environ.get(_FAILURE)
    if path is None:
        raise error
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
        file.write(str(error))


def in_session(args: argparse.Namespace, work: Callable[["Session"], int]) -> int:
    """Run ``work`` in a session of ``args``: in this process, in one of a launcher's, or in ranks that are started for --tp,
    --ep, --pp and, where a command has it, --dp. Returns the exit code."""
    from parallel.process import started_by_launcher

    split = args.tp * args.ep * args.pp * getattr(args, "dp", 1) > 1
    if split and not started_by_launcher():
        return start_ranks(args)
    if not split:
        limit_threads()
    from qwen_moe.generation.session import Session

    try:
        with Session(args, split) as session:
            return work(session)
    except UserError as error:
        report_failure(error)
        return USER_ERROR


def split_layout(config: ModelConfig, args: argparse.Namespace, ranks: int) -> Layout:
    """The layout of ``ranks`` processes for --tp, --ep and --pp. Raises LayoutError if the model cannot be split so."""
    from qwen_moe.sharding.layout import check_layout

    layout = layout_for(ranks, tp=args.tp, ep=args.ep, pp=args.pp)
    check_layout(config, layout, args.tp)
    if config.num_hidden_layers < args.pp:
        raise LayoutError(
            f"{counted(config.num_hidden_layers, 'layer')} cannot fill pp {counted(args.pp, 'stage')}: lower --pp"
        )
    return layout


def start_ranks(args: argparse.Namespace) -> int:
    """Run the command that this process was called with (``args.argv``), in as many processes as --tp, --ep, --pp and --dp
    need. Returns its exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from qwen_moe.checkpoint.huggingface.convert import open_weights

    try:
        ranks = smallest_world(getattr(args, "dp", 1) * args.tp * args.pp, tp=args.tp, ep=args.ep, pp=args.pp)
        split_layout(open_weights(args.checkpoint).config, args, ranks)
    except LayoutError as error:
        raise UserError(str(error)) from None
    gpus = visible_gpus()
    if gpus and gpus < ranks:
        raise UserError(
            f"--tp {args.tp} --ep {args.ep} --pp {args.pp} need {counted(ranks, 'process')}, each with its own GPU, "
            "and this machine "
            f"has {gpus}: lower them, or start the command with torchrun or srun on more machines"
        )
    os.environ |= choose_threads(ranks, 0).environment() | heap_environment()
    logging.disable(logging.CRITICAL)  # the ranks report their failures themselves
    launch = one_machine(ranks, shutdown_timeout=30)
    with tempfile.TemporaryDirectory(prefix="qwen-moe-") as folder:
        failure = Path(folder) / "failure"
        os.environ[_FAILURE] = str(failure)
        try:
            elastic_launch(launch, sys.executable)("-m", "qwen_moe", *args.argv)
        except ChildFailedError:
            if failure.exists():
                raise UserError(failure.read_text(encoding="utf-8")) from None
            return 1  # the rank has printed a traceback
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            del os.environ[_FAILURE]
    return 0
