"""`qwen-moe plan RECIPE --gpus N --gpu NAME`: the fastest layouts that fit in memory, with their memory and step time."""

import argparse
import json
import sys
from math import gcd
from pathlib import Path
from typing import Any

from qwen_moe.config import ModelConfig, RunConfig, find_recipe, load_config, load_stage, parse_config, refuse_stages
from qwen_moe.config.fields import LARGEST_SIZE, MOST_PROCESSES
from qwen_moe.documents import yaml_mapping
from qwen_moe.errors import UserError
from qwen_moe.options import number, whole

MOST_PRICE = 10**9  # of a GPU-hour, in any currency


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "plan", help="find the fastest parallel layouts that fit on a cluster (docs/plan.md)"
    )
    parser.add_argument("recipe", type=Path, nargs="?", help="a YAML file with every setting of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument("--gpus", type=whole(1, MOST_PROCESSES), help="number of GPUs in all")
    parser.add_argument("--gpu", default="h100-80gb", help="a name, or a .yaml file (default: h100-80gb)")
    parser.add_argument("--gpus-per-node", type=whole(1, MOST_PROCESSES), default=8, help="default: 8")
    parser.add_argument("--network", default="ib400", help="a name, or a .yaml file (default: ib400)")
    parser.add_argument(
        "--global-batch", type=whole(1, LARGEST_SIZE), help="sequences per step (default: the recipe's)"
    )
    parser.add_argument(
        "--imbalance",
        type=number(least=1),
        default=1.0,
        help="tokens of the busiest expert over the average (default: 1)",
    )
    parser.add_argument(
        "--margin",
        type=number(least=0, most=0.9),
        default=0.0,
        help="share of a GPU's usable memory that must stay free (default: 0)",
    )
    parser.add_argument(
        "--stage",
        default="",
        metavar="NAME",
        help="the stage to plan, of a run with stages (default: the longest sequences)",
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp8", "any"), default="any", help="of the layouts to try (default: any)"
    )
    parser.add_argument(
        "--price",
        type=number(least=0, most=MOST_PRICE),
        help="price of a GPU-hour (default: as in the GPU's file)",
    )
    parser.add_argument("--top", type=whole(1), default=5, help="number of layouts to print (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--write", action="store_true", help="write the best layout into the recipe")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="also count what a step of the best layout launches, as qwen-moe trace does",
    )
    parser.add_argument("--check-published", action="store_true", help="compare predicted times with published runs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    if args.check_published:
        return _check_published(args)
    if args.recipe is None or args.gpus is None:
        raise UserError("give a recipe and --gpus N, or --check-published")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise UserError(
            f"--gpus {args.gpus} is not a multiple of --gpus-per-node {args.gpus_per_node}: give whole nodes"
        )
    if args.write and (found := find_recipe(args.recipe)) != args.recipe:
        raise UserError(f"--write changes the recipe, and {args.recipe} is qwen-moe's own: cp {found} my.yaml first")
    from qwen_moe.planning.hardware import Cluster, load_gpu, load_network

    cluster = Cluster(load_gpu(args.gpu).leaving(args.margin), load_network(args.network), args.gpus_per_node)
    if args.precision != "any":
        cluster.gpu.require(args.precision)
    overrides = _overrides(args)
    if args.write:
        refuse_stages(load_config(args.recipe, overrides), "qwen-moe plan --write")
    config = load_stage(args.recipe, overrides, args.stage)
    _check_imbalance(args.imbalance, config.model)
    from qwen_moe.planning.layouts import PRECISIONS
    from qwen_moe.planning.search import Search
    from qwen_moe.planning.text import plan_text
    from qwen_moe.sharding.aligned import check_aligned
    from qwen_moe.tracing.page import facts as trace_facts
    from qwen_moe.tracing.page import text as trace_text

    check_aligned(config.model)
    if args.trace:
        from qwen_moe.tracing.rank import check_objective

        check_objective(config)
    precisions = PRECISIONS if args.precision == "any" else (args.precision,)
    search = Search(config, args.gpus, cluster, args.imbalance, args.price, precisions)
    plan = search.run(args.top)
    written: dict[str, Any] = {}
    if args.write:
        if not plan.best:
            raise UserError(f"{args.recipe}: nothing fits on {args.gpus} x {cluster.gpu.name}, so nothing was written\n"
                            + plan_text(plan, str(args.recipe)))  # fmt: skip
        written = _write(args.recipe, overrides, config, plan.best[0].choice, args.gpus)
    if args.json:
        facts = _facts(plan)
        if args.write:
            facts["written"] = written
        if args.trace:
            facts["trace"] = trace_facts(traced) if (traced := _traced(plan)) is not None else None
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return 0
    sys.stdout.write(plan_text(plan, str(args.recipe)) + "\n")
    _say_written(args, written)
    if args.trace and (traced := _traced(plan)) is not None:
        sys.stdout.write("\n" + trace_text(traced, str(args.recipe)) + "\n")
    return 0


def _overrides(args: argparse.Namespace) -> list[str]:
    """The overrides, with --global-batch among them. The search chooses the micro-batch, so the recipe's need not divide
    --global-batch."""
    given = list(args.overrides)
    if args.global_batch is None:
        return given
    micro_batch = load_stage(args.recipe, given, args.stage).training.micro_batch_size
    given.append(f"training.global_batch_size={args.global_batch}")
    if args.global_batch % micro_batch:
        given.append(f"training.micro_batch_size={gcd(micro_batch, args.global_batch)}")
    return given


def _say_written(args: argparse.Namespace, written: dict[str, Any]) -> None:
    if args.write:
        for key, (old, new) in written["changed"].items():
            sys.stdout.write(f"{args.recipe}: {key} {'(not given)' if old is None else old} -> {new}\n")
        if not written["changed"]:
            sys.stdout.write(f"{args.recipe}: unchanged\n")
        elif not written["comments_kept"]:
            sys.stdout.write(f"{args.recipe}: could not be edited in place, so it was rewritten without its comments\n")


def _traced(plan: Any) -> Any:
    """The `StepTrace` of rank 0 in the best layout, or None where nothing fits."""
    from qwen_moe.planning.layouts import apply
    from qwen_moe.tracing.rank import trace_step

    return trace_step(apply(plan.config, plan.best[0].choice), plan.gpus) if plan.best else None


def _check_imbalance(imbalance: float, model: ModelConfig) -> None:
    """Raises UserError for more tokens than the busiest expert can have: all of them, where the average has k of E."""
    if not model.is_moe_family:
        if imbalance > 1:
            raise UserError(f"--imbalance {imbalance:g}: the model has no experts, so leave the option out")
    elif imbalance > (most := model.num_experts / model.num_experts_per_tok):
        raise UserError(
            f"--imbalance {imbalance:g}: expected {most:g} at most, num_experts {model.num_experts} / num_experts_per_tok "
            f"{model.num_experts_per_tok}: the busiest expert cannot have more than every token"
        )


def _facts(plan: Any) -> dict[str, Any]:
    return {
        "gpus": plan.gpus,
        "gpu": plan.cluster.gpu.model_dump(),
        "network": plan.cluster.network.model_dump(),
        "gpus_per_node": plan.cluster.gpus_per_node,
        "global_batch_size": plan.config.training.global_batch_size,
        "usable_bytes": plan.cluster.gpu.usable_bytes,
        "legal_layouts": plan.legal,
        "seconds": plan.seconds,
        "best": [scored.facts() for scored in plan.best],
        "too_large": [
            {"layout": m.scored.facts(), "nearest_that_fits": m.nearest.facts() if m.nearest is not None else None}
            for m in plan.misfits
        ],
        "ep_overlap": plan.overlapped.facts() if plan.overlapped is not None else None,
        "gpus_needed": plan.gpus_needed,
    }


def _write(path: Path, overrides: list[str], config: RunConfig, choice: Any, gpus: int) -> dict[str, Any]:
    """Write ``choice`` and the ``overrides`` it was planned with into the recipe. Raises if a run would not accept it."""
    import yaml

    from launchers.folder.atomic import write_text
    from qwen_moe.planning.recipe_edit import differences, edit_recipe
    from qwen_moe.sharding.layout import run_layout

    text = path.read_text(encoding="utf-8")
    settings: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, leaf = key.partition(".")
        if not leaf or "." in leaf:
            raise UserError(
                f"--write cannot write override {override!r} into the recipe: write it there yourself, then plan"
            )
        settings.setdefault(section, {})[leaf] = yaml.safe_load(value)
    for section, entries in choice.settings().items():
        settings.setdefault(section, {}).update(entries)
    values = yaml_mapping(text, str(path))
    if (values.get("parallel") or {}).get("pipeline_split"):
        settings["parallel"]["pipeline_split"] = []
    changed = differences(values, settings)
    edited, kept = edit_recipe(text, settings)
    run_layout(parse_config(yaml_mapping(edited, str(path)), str(path)), gpus)
    if changed:
        write_text(path, edited)
    return {"changed": changed, "comments_kept": kept}


def _check_published(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from qwen_moe.planning.published import rows, table

    found = list(rows())
    if args.json:
        sys.stdout.write(json.dumps([asdict(row) | {"error": row.error} for row in found], indent=1) + "\n")
    else:
        sys.stdout.write(table(found) + "\n")
    return 0
