"""`qwen-moe status|logs|cancel`: show launched runs and stop them."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from launchers.errors import LaunchError
from launchers.folder import logs
from launchers.folder.run_folder import RunFolder
from launchers.job import status
from qwen_moe.options import whole


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("status", help="show launched runs: queue, attempts, step, loss, ETA")
    parser.add_argument(
        "runs", nargs="*", type=Path, help="run folders, or folders that hold them (default: runs and .)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list on stdout")
    parser.set_defaults(func=show_status)

    parser = subparsers.add_parser("logs", help="print the ranks' logs of a launched run, oldest line first")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--follow", action="store_true", help="also print new lines until the run has ended")
    parser.add_argument("--rank", type=whole(), help="only this rank (default: all)")
    parser.add_argument("--attempt", type=whole(), help="number of the attempt (default: the last one)")
    parser.set_defaults(func=show_logs)

    parser = subparsers.add_parser("cancel", help="cancel the job of a launched run; it is not requeued")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.set_defaults(func=cancel)


def show_status(args: argparse.Namespace) -> int:
    roots = args.runs or [Path("runs"), Path()]
    runs = status.find_runs(roots)
    if args.runs:
        for root in roots:
            if not status.find_runs([root]):
                raise LaunchError(f"{root} is not a launched run and holds none: give the run_dir of one")
    jobs, unasked = status.ask_queue()
    rows = [status.row(run, jobs, unasked) for run in runs]
    if args.json:
        print(json.dumps(rows))
    elif rows:
        print(status.table(rows, Path.cwd()))
        if any(row["last"] == unasked for row in rows) and unasked:
            print(f"note: {unasked}; states that only Slurm knows are shown as unknown", file=sys.stderr)
    else:
        print("no launched runs here", file=sys.stderr)
    return 0


def show_logs(args: argparse.Namespace) -> int:
    run = RunFolder(args.run)
    ended = status.Ended(run)
    while args.follow and args.attempt is None and run.facts() and not run.attempts():
        if why := ended():
            raise LaunchError(f"{args.run} has no logs: {why}")
        time.sleep(0.5)  # the job waits in the queue
    attempt = logs.choose_attempt(run, args.attempt)
    lines = logs.follow(run, attempt, args.rank, ended=ended) if args.follow else logs.merged(attempt, args.rank)
    try:
        for line in lines:
            print(line, flush=args.follow)
    except BrokenPipeError:  # `qwen-moe logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def cancel(args: argparse.Namespace) -> int:
    for run in args.runs:
        print(status.cancel(run.resolve()))
    return 0
