"""`qwen-moe verify RECIPE --layout tp=2,pp=2,ep=4 [--fuzz N]`: check that every layout computes the same as one process."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from launchers.counted import counted
from qwen_moe.config import ObjectiveConfig, RunConfig, load_config, parse_config
from qwen_moe.config.fields import MOST_PROCESSES
from qwen_moe.errors import UserError
from qwen_moe.options import whole

if TYPE_CHECKING:
    from parallel.mesh import Layout
    from qwen_moe.verify.case import Case

AXES = ("tp", "pp", "dp", "cp", "ep", "etp")
OPTIONS = ("schedule", "stages_per_rank", "sharding", "gradient_reduction", "cp_kind", "cp_ulysses", "ep_overlap")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "verify",
        help="compare parallel layouts with one process, in float64 on this machine",
        description="Shrinks the recipe's model (keeping its features), trains 3 steps in float64 in one process and in "
        "each layout, and compares loss, auxiliary losses, every gradient, gradient norm, parameters, and the loss of an "
        "evaluation.",
    )
    parser.add_argument("recipe", type=Path, help="a YAML file with every setting of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="tp=2,pp=2,ep=4",
        help=f"axes {', '.join(AXES)} and {', '.join(OPTIONS)}; dp is as small as possible unless given; repeatable",
    )
    parser.add_argument("--fuzz", type=whole(), default=0, metavar="N", help="N random layouts of random small models")
    parser.add_argument("--seed", type=whole(), default=0, help="seed of --fuzz")
    parser.add_argument(
        "--objective",
        choices=get_args(ObjectiveConfig.model_fields["kind"].annotation),
        help="the objective instead of the recipe's own; --fuzz draws its settings and packed documents with padding",
    )
    parser.add_argument("--max-ranks", type=whole(2, 1024), default=8, help="largest number of processes (default 8)")
    parser.add_argument(
        "--shapes",
        type=whole(0, MOST_PROCESSES),
        default=0,
        metavar="PROCESSES",
        help="build the recipe itself, at full size, as ranks of that many processes and run a step on shapes alone",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)


# How often weights are drawn again before a layout counts as not equal.
REDRAWS = 3


def parse_layout(text: str, config: RunConfig) -> tuple["Layout", RunConfig]:
    """The layout that ``text`` describes, and the recipe with the other options of ``text``. Axes that it does not name are
    1; dp is as small as possible."""
    from parallel.mesh import Layout, LayoutError, layout_for, smallest_world

    degrees: dict[str, int] = {}
    options: dict[str, Any] = {}
    for item in text.split(","):
        key, _, value = item.strip().partition("=")
        if key in AXES and value.isdigit() and int(value) > 0:
            degrees[key] = int(value)
        elif key in OPTIONS and value:
            options[key] = value
        else:
            raise UserError(
                f"--layout {text!r}: {item!r} is not AXIS=NUMBER with one of {', '.join(AXES)} (or one of "
                f"{', '.join(OPTIONS)} with its value), such as tp=2,pp=2,ep=4"
            )
    dp = degrees.pop("dp", 0)
    try:
        layout = Layout(dp=dp, **degrees) if dp else layout_for(smallest_world(1, **degrees), **degrees)
    except LayoutError as error:
        raise UserError(f"--layout {text!r}: {error}") from None
    if options:
        from qwen_moe.config import parse_config

        values = config.model_dump()
        values["parallel"] |= options
        config = parse_config(values, f"--layout {text!r}")
    return layout, config


def _cases(args: argparse.Namespace, config: RunConfig) -> list[tuple[str, "Case"]]:
    from parallel.mesh import LayoutError
    from qwen_moe.sharding.layout import check_layout, context_plan, run_layout
    from qwen_moe.verify.case import Case, draw, dropped_overlap, dropped_split, shrink

    cases = []
    for text in args.layout:
        layout, recipe = parse_layout(text, config)
        if layout.world_size > args.max_ranks:
            raise UserError(
                f"--layout {text!r} needs {counted(layout.world_size, 'process')} but --max-ranks is "
                f"{args.max_ranks}: raise it or "
                "verify a smaller layout"
            )
        small = shrink(recipe, layout)
        run_layout(small, layout.world_size)
        try:
            check_layout(recipe.model, layout, recipe.data.sequence_length)
            context_plan(recipe, layout)
        except LayoutError as error:
            print(f"note: the recipe itself cannot run with {text}: {error}", file=sys.stderr)
        for note in filter(None, (dropped_split(recipe, layout), dropped_overlap(recipe, layout))):
            print(f"note: {text}: {note}", file=sys.stderr)
        case = Case(small, layout)
        cases.append((text if "cp_kind" in text or "ep_overlap" in text else text + _marks(case), case))
    for index in range(args.fuzz):
        case = draw(args.seed, index, args.max_ranks, config.objective.kind)
        cases.append((f"#{index} {case.layout}{_marks(case)}", case))
    return cases


def _marks(case: "Case") -> str:
    """What the degrees of a case do not say."""
    from qwen_moe.sharding.layout import context_plan
    from qwen_moe.verify.examples import replays

    kind = f" {context_plan(case.config, case.layout).text(case.layout.cp)}" if case.layout.cp > 1 else ""
    kind += " ep_overlap" if case.config.parallel.ep_overlap else ""
    objective = case.config.objective.kind
    replay = ", routing replayed" if replays(case.config) else ""
    return kind + (" log-probs" if case.probe else "" if objective == "likelihood" else f" {objective}{replay}")


def _with_objective(config: RunConfig, kind: str) -> RunConfig:
    """The recipe with another objective and without what only its own needs: nothing is read or sampled here."""
    values = config.model_dump()
    tokens = max(config.training.train_tokens, config.tokens_per_step)
    data = {"train": [{"prefix": "unused"}], **{key: values["data"][key] for key in ("sequence_length", "seed")}}
    values |= {"objective": values["objective"] | {"kind": kind}, "data": data, "rollout": None, "sample_prompt": ""}
    return parse_config(
        values | {"training": values["training"] | {"train_tokens": tokens, "epochs": 0}}, "--objective"
    )


def run(args: argparse.Namespace) -> int:
    config = load_config(args.recipe, args.overrides)
    if args.objective:
        config = _with_objective(config, args.objective)
    if args.shapes:
        return _shapes(args, config)
    if not args.layout and not args.fuzz:
        raise UserError("nothing to verify: give --layout tp=2,ep=2 (repeatable), --fuzz N or --shapes PROCESSES")
    from parallel.local_group import preload
    from qwen_moe.verify.compare import TOLERANCE

    preload(["qwen_moe.verify.ranks"])
    cases = _cases(args, config)
    if config.precision.compute == "fp8":
        print("note: the recipe computes in fp8; layouts are compared in float64, without it", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    out = sys.stderr if args.json else sys.stdout
    print(
        f"{'layout':44s} {'loss':>8s} {'aux':>8s} {'gradients':>9s} {'norm':>8s} {'weights':>8s} {'eval':>8s}  (largest "
        f"relative difference from one process, float64; limit {TOLERANCE:.0e})",
        file=out,
    )
    for name, case in cases:
        row, text = _compare(name, case)
        rows.append(row)
        print(text, file=out, flush=True)
    bad = [row["layout"] for row in rows if not row["equal"]]
    print(
        f"{len(rows) - len(bad)} of {counted(len(rows), 'layout')} equal one process"
        + (f"; not equal: {'; '.join(bad)}" if bad else ""),
        file=out,
    )
    if args.json:
        print(json.dumps({"tolerance": TOLERANCE, "equal": not bad, "layouts": rows}))
    return 1 if bad else 0


def _compare(name: str, case: "Case") -> tuple[dict[str, Any], str]:
    """Run one case in its layout and in one process: the row of the report, and the line that is printed. If rounding alone
    makes a difference near the limit in one process too, the case says nothing, and is run again with other weights."""
    note = ""
    for more in range(REDRAWS + 1):
        row, text, sensitive = _compare_once(name, case._replace(config=_with_seed(case.config, more)))
        if sensitive is None:
            break
        note = (
            f"  (weights drawn again: with others a change in their last digit became {sensitive:.0e} in one process)"
        )
    return row, text + note


def _with_seed(config: RunConfig, more: int) -> RunConfig:
    return config.model_copy(update={"seed": config.seed + more})


def _compare_once(name: str, case: "Case") -> tuple[dict[str, Any], str, float | None]:
    """The row, the line, and for a case that is not equal how sensitive one process is, if that explains it."""
    from parallel.local_group import RankFailed, run_local
    from qwen_moe.verify.case import STEPS
    from qwen_moe.verify.compare import TOLERANCE, compare, sensitivity
    from qwen_moe.verify.ranks import train_rank
    from qwen_moe.verify.reference import train_reference

    config, layout, probe = case
    label = name if layout.pp == 1 else f"{name} {config.parallel.schedule}"
    row: dict[str, Any] = {"layout": name, "ranks": layout.world_size, "config": config.model_dump(mode="json")}
    row["objective"] = "probe" if probe else config.objective.kind
    try:
        reports = run_local(train_rank, layout.world_size, config, STEPS, probe, timeout=300)
    except RankFailed as error:
        return row | {"equal": False, "error": str(error)}, f"{label:44s} FAILED: {error.cause}", None
    reference = train_reference(config, layout.dp, STEPS, probe)
    differences = compare(reports, reference)
    row |= {
        "equal": differences.equal,
        "loss": differences.loss,
        "auxiliary": differences.auxiliary,
        "gradients": differences.gradients,
        "gradient_norm": differences.grad_norm,
        "parameters": differences.parameters,
        "evaluated": differences.evaluated,
        "worst": differences.worst,
        "wrong": differences.wrong,
    }
    figures = (
        f"{differences.loss:8.0e} {differences.auxiliary:8.0e} {differences.gradients:9.0e} "
        f"{differences.grad_norm:8.0e} {differences.parameters:8.0e} {differences.evaluated:8.0e}"
    )
    sensitive = None
    if not differences.equal and not differences.wrong:
        found = sensitivity(reference, train_reference(config, layout.dp, STEPS, probe, nudged=True))
        sensitive = found if found > TOLERANCE / 10 else None
    return row, f"{label:44s} {figures}{_verdict(differences)}", sensitive


def _shapes(args: argparse.Namespace, config: RunConfig) -> int:
    """Run the first process of each pipeline rank, and the last process, on shapes alone."""
    from dataclasses import asdict

    from qwen_moe.verify.shapes import run_shapes

    if args.layout or args.fuzz:
        raise UserError(
            "--shapes runs the layout of the recipe (parallel.tp=... after it): leave --layout and --fuzz out"
        )
    stage = max(1, args.shapes // config.parallel.pp)
    ranks = sorted({*range(0, args.shapes, stage), args.shapes - 1})
    reports = []
    for rank in ranks:
        report = run_shapes(config, args.shapes, rank)
        reports.append(asdict(report))
        if not args.json:
            layers = "; ".join(f"{part[0]}-{part[-1]}" for part in report.layers)
            print(
                f"rank {rank:6d} of {args.shapes} ({report.layout}): layers {layers}, {report.parameters / 1e6:,.1f} M "
                f"parameters held, one step of shapes in {report.seconds:.1f} s",
                flush=True,
            )
    if args.json:
        print(json.dumps({"processes": args.shapes, "ranks": reports}))
    return 0


def _verdict(differences: Any) -> str:
    if differences.equal:
        return ""
    wrong = [*differences.wrong, *(f"{kind}: {name}" for kind, name in differences.worst.items() if name)]
    return f"  NOT EQUAL ({'; '.join(wrong[:4])})"
