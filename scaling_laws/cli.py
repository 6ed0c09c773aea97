"""`qwen-moe scaling fit|recommend|report`. Each verb imports what it needs, so that the others need not wait for it."""

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scaling_laws.counted import counted

MOST_SAMPLES = 1_000_000
# Limits of a request's numbers: far beyond any training run, but nothing overflows.
LIMITS: dict[str, tuple[float, float]] = {
    "n_total": (1, 1e18),
    "n_active": (1, 1e18),
    "tokens": (1, 1e18),
    "unique_tokens": (1, 1e18),
    "flops": (1, 1e40),
    "activated_share": (1e-6, 1),
    "granularity": (1e-3, 1e6),
    "seq_len": (1, 2**31 - 1),
    "data_parallel": (1, 2**20),
    "micro_batch": (1, 2**20),
}


def register(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """Add `scaling` and its verbs. Returns the subparsers, to which further verbs can be added."""
    scaling = subparsers.add_parser("scaling", help="choose learning rate, batch size and model size from small runs")
    verbs = scaling.add_subparsers(dest="scaling_verb", required=True, metavar="VERB")
    fit = verbs.add_parser("fit", help="fit laws to tables of runs")
    fit.add_argument("runs", nargs="+", type=Path, metavar="RUNS.csv", help="CSV or JSONL, see docs/scaling-laws.md")
    fit.add_argument("--output", type=Path, required=True, metavar="FIT_DIR", help="folder for the fit")
    fit.add_argument("--samples", type=int, default=200, help="refits or draws, for intervals (default: 200)")
    fit.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    fit.add_argument(
        "--no-prior", action="store_true", help="use what laboratories publish only for what the table does not tell"
    )
    fit.add_argument(
        "--without-laboratory",
        action="append",
        default=[],
        metavar="NAME",
        help='leave out a laboratory\'s published law, such as "Step Law"; may be repeated',
    )
    fit.add_argument("--json", action="store_true", help="print the result as JSON")
    # ``saving``: a context manager for a folder, within which no other process writes there
    fit.set_defaults(func=_fit, needs=("scipy", "pandas"), saving=contextlib.nullcontext)
    recommend = verbs.add_parser("recommend", help="learning rate, batch size and loss of a run to launch")
    recommend.add_argument("fit", type=Path, metavar="FIT_DIR", help="a folder that `fit` wrote")
    recommend.add_argument("--n-total", type=float, help="parameters, counted as in the table")
    recommend.add_argument("--n-active", type=float, help="parameters activated by one token (default: all)")
    recommend.add_argument("--tokens", type=float, help="training tokens")
    recommend.add_argument(
        "--flops", type=float, help="6 N_active D, instead of sizes: the compute-optimal sizes are computed"
    )
    recommend.add_argument(
        "--activated-share", type=float, help="N_active / N_total, with --flops (default: the best that the runs cover)"
    )
    recommend.add_argument(
        "--granularity", type=float, help="granularity of the experts, if the runs vary it (default: their median)"
    )
    recommend.add_argument("--unique-tokens", type=float, help="number of different tokens, if --tokens repeats them")
    recommend.add_argument("--seq-len", type=int, required=True, help="tokens of a sequence")
    recommend.add_argument("--data-parallel", type=int, default=1, help="data-parallel ranks, which divide the batch")
    recommend.add_argument(
        "--micro-batch", type=int, default=1, help="sequences of a micro-batch, which divide the batch"
    )
    recommend.add_argument("--accept-extrapolation", action="store_true", help="answer even far outside the runs")
    recommend.add_argument("--json", action="store_true", help="print the result as JSON")
    recommend.set_defaults(func=_recommend, needs=("scipy", "pandas"))
    report = verbs.add_parser("report", help="draw a fit's pictures and write its report")
    report.add_argument("fit", type=Path, metavar="FIT_DIR", help="a folder that `fit` wrote")
    report.set_defaults(func=_report, needs=("scipy", "pandas", "matplotlib"))
    return verbs


def _check_folder(output: Path) -> None:
    """Raises InputError if a folder cannot be written: that is told before the fit, which may take minutes."""
    from scaling_laws.errors import InputError

    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--output {output}: {there} is a file: give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output {output}: {there} cannot be written to: give another folder")


def _progress(steps: Iterable[int]) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(steps, desc="resample", file=sys.stderr, leave=False, mininterval=0.5)


def _fit(args: argparse.Namespace) -> int:
    from scaling_laws.errors import InputError
    from scaling_laws.fitting import fit_table
    from scaling_laws.laboratories import laboratory_prior
    from scaling_laws.report import report_text
    from scaling_laws.runs import read_runs

    if not 0 <= args.samples <= MOST_SAMPLES:
        raise InputError(f"--samples {args.samples}: give 0 or more, at most {MOST_SAMPLES:,}")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: give 0 or more")
    _check_folder(args.output)
    prior = laboratory_prior(args.without_laboratory, removed=args.no_prior)
    table = read_runs(args.runs)
    fit = fit_table(table, samples=args.samples, seed=args.seed, progress=_progress, prior=prior)
    args.output.mkdir(parents=True, exist_ok=True)
    with args.saving(args.output):
        fit.save(args.output, table)
    if args.json:
        facts = json.loads((args.output / "fit.json").read_text(encoding="utf-8"))
        print(json.dumps({key: value for key, value in facts.items() if not key.endswith("_samples")}))
    else:
        print(report_text(fit, []))
        print(f"saved in {args.output}; pictures: qwen-moe scaling report {shlex.quote(str(args.output))}")
    return 0


def _recommend(args: argparse.Namespace) -> int:
    from scaling_laws.errors import InputError
    from scaling_laws.fitting import load_fit
    from scaling_laws.recommend import Request, recommend

    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a number from {low:g} to {high:g}")
    if args.flops is None and args.activated_share is not None:
        raise InputError("--activated-share is for --flops: with sizes, give --n-active")
    if args.flops is not None and (args.n_total, args.n_active, args.tokens) != (None, None, None):
        raise InputError("give --flops (with --activated-share) or sizes (--n-total, --n-active, --tokens), not both")
    found = recommend(
        load_fit(args.fit),
        Request(
            n_total=args.n_total,
            n_active=args.n_active,
            tokens=args.tokens,
            flops=args.flops,
            ratio=args.activated_share,
            granularity=args.granularity,
            unique_tokens=args.unique_tokens,
            seq_len=args.seq_len,
            data_parallel=args.data_parallel,
            micro_batch=args.micro_batch,
            accept_extrapolation=args.accept_extrapolation,
        ),
    )
    print(json.dumps(found) if args.json else _text(found))
    return 0


def _text(found: dict[str, Any]) -> str:
    def interval(key: str, form: str) -> str:
        values = found["intervals"][key]
        return f"   95%: {values[0]:{form}} to {values[1]:{form}}" if values else ""

    lines = [
        f"for N {found['n_total']:.4g} ({found['n_active']:.4g} activated), D {found['tokens']:.4g} tokens, "
        f"{found['flops']:.3g} FLOPs",
        f"  learning rate      {found['learning_rate']:.3e}{interval('learning_rate', '.2e')}",
        f"  batch size         {found['batch_size_tokens']:,} tokens = {counted(found['batch_size_sequences'], 'sequence')}"
        f"{interval('batch_size_tokens', ',.0f')}",
        f"  expected excess    {found['predicted_excess_loss']:.3%} of loss, because the optimum is not known exactly"
        f"{interval('predicted_excess_loss', '.3%')}",
        f"  widest batch       {found['widest_batch_tokens']:,.0f} tokens cost less than 0.1% more, at their best rate",
    ]
    if found["predicted_loss"] is not None:
        lines.append(f"  predicted loss     {found['predicted_loss']:.4f}{interval('predicted_loss', '.4f')}")
    if "step_law" in found:
        other = found["step_law"]
        lines.append(
            f"  Step Law, fitted   learning rate {other['learning_rate']:.3e}, "
            f"batch {other['batch_size_tokens']:,.0f} tokens"
        )
    for name, other in found["published"].items():
        lines.append(
            f"  {name + ',':18s} learning rate {other['learning_rate']:.3e}, batch {other['batch_size_tokens']:,.0f} tokens"
        )
    outside = {name: ratio for name, ratio in found["extrapolation"].items() if ratio > 1.001}
    told = ", ".join(f"{name} {ratio:.3g}x" for name, ratio in outside.items())
    lines.append(
        f"  extrapolation      {told + ' beyond the runs' if told else 'none: every quantity is inside the runs'}"
    )
    for row in found.get("shapes", []):
        lines.append(
            f"  {row['activated_share']:7.2%} activated: N {row['n_total']:.3g}, D {row['tokens']:.3g}, "
            f"loss {row['loss']:.4f} ({row['cost_of_share']:.2%} above the best share); "
            f"half the size costs {row['cost_of_half_size']:.2%}, "
            f"twice {row['cost_of_twice_size']:.2%}"
        )
    lines += [f"  {line}" for line in found["prior"]["text"]]
    lines += [f"  note: {warning}" for warning in found["warnings"]]
    return "\n".join(lines)


def _report(args: argparse.Namespace) -> int:
    from scaling_laws.fitting import load_fit, read_table
    from scaling_laws.plots import (
        draw_exponents,
        draw_extrapolation,
        draw_isoflop,
        draw_loss,
        draw_surface,
        draw_validation,
    )
    from scaling_laws.report import write_report

    fit = load_fit(args.fit)
    frame = read_table(fit, args.fit).frame
    pictures = []
    if fit.surface is not None:
        pictures.append(draw_surface(fit, frame, args.fit / "surface.png"))
    if fit.loss_law is not None:
        pictures.append(draw_loss(fit, frame, args.fit / "loss.png"))
        pictures.append(draw_isoflop(fit, frame, args.fit / "isoflop.png"))
    if any("loss_error" in row for row in fit.validation):
        pictures.append(draw_validation(fit, args.fit / "held_out.png"))
    if fit.extrapolation:
        pictures.append(draw_extrapolation(fit, args.fit / "extrapolation.png"))
    if len(fit.surface_samples) >= 20 or len(fit.loss_samples) >= 20:
        pictures.append(draw_exponents(fit, args.fit / "exponents.png"))
    page = write_report(fit, args.fit, [path.name for path in pictures])
    for path in [page, *pictures]:
        print(path)
    return 0
