"""`qwen-moe scaling ladder`: writes recipes of the small runs to launch next, made from the large run's recipe."""

import argparse
import csv
import io
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.folder.atomic import write_text
from launchers.folder.run_folder import CHECKPOINTS
from qwen_moe.alone import alone
from qwen_moe.config import ModelConfig, RunConfig, dump_config, load_config, parse_config, refuse_stages
from qwen_moe.errors import UserError
from qwen_moe.models.flops import count_parameters
from qwen_moe.options import number

TABLE = "ladder.csv"
MOVED = 0.06  # share by which a batch may be moved to suit micro-batches: an eighth of a step between neighbours
DURATIONS = (10.0, 20.0, 40.0, 80.0, 160.0)  # tokens per activated parameter
LEAST_DURATION = 1  # `scaling fit` leaves shorter runs out (scaling_laws.early)
BELOW = ", below them"


def register(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ladder = verbs.add_parser("ladder", help="write the recipes of small runs to launch")
    ladder.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE.yaml",
        help="the large run's recipe: its model and train_tokens are the target",
    )
    ladder.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    ladder.add_argument(
        "--flops-budget", type=number(above=0), required=True, help="sum of 6 N_active D over the small runs"
    )
    ladder.add_argument("--output", type=Path, required=True, metavar="LADDER_DIR")
    ladder.add_argument(
        "--fit", type=Path, metavar="FIT_DIR", help="a fit of earlier runs to start from (default: published laws)"
    )
    ladder.add_argument(
        "--pattern",
        choices=("grid", "cross"),
        default="grid",
        help="runs of each size and duration: 3 x 3 learning rates and batch sizes, or a cross of five (default: grid)",
    )
    add_durations(ladder)
    ladder.add_argument("--json", action="store_true", help="print the result as JSON")
    ladder.set_defaults(func=run, needs=("scipy", "pandas"))


def add_durations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens-per-parameter",
        nargs="+",
        type=number(least=LEAST_DURATION),
        default=list(DURATIONS),
        metavar="RATIO",
        help=f"durations of the small runs, per activated parameter (default: {' '.join(f'{d:g}' for d in DURATIONS)})",
    )


def smaller_models(model: ModelConfig) -> list[ModelConfig]:
    """At most six models, up to 12 times narrower and shallower than ``model``, each at least 1.5 times as large as the
    next. They keep head_dim, number of experts, top-k, query heads per KV head and vocabulary, and so the sparsity."""
    found: list[tuple[int, ModelConfig]] = []
    whole = count_parameters(model).non_vocabulary_total
    for factor in (1.2, 1.4, 1.6, 2, 2.5, 3, 4, 5, 6, 8, 10, 12):
        group = model.num_attention_heads // model.num_key_value_heads
        kv_heads = max(1, round(model.num_key_value_heads / factor))
        hidden = max(16, round(model.hidden_size * kv_heads / model.num_key_value_heads / 16) * 16)
        layers = max(2, round(model.num_hidden_layers / factor))
        values = model.model_dump() | {
            "hidden_size": hidden,
            "num_attention_heads": group * kv_heads,
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": layers,
            "mlp_only_layers": [layer for layer in model.mlp_only_layers if layer < layers],
        }
        for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
            if values[key]:
                values[key] = max(16, round(values[key] * hidden / model.hidden_size / 16) * 16)
        if model.is_moe_family and model.decoder_sparse_step > layers:
            continue
        small = ModelConfig(**values)
        size = count_parameters(small).non_vocabulary_total
        if size < (found[-1][0] if found else whole) / 1.5:
            found.append((size, small))
    return [small for _, small in found[-6:]]


def _decay_share(config: RunConfig) -> float | None:
    """The decay's share of a run's tokens with WSD, where shorter runs can branch off; None for other schedules."""
    return config.schedule.decay_tokens / config.training.train_tokens if config.schedule.kind == "wsd" else None


def _batch(wanted: float, most: int) -> tuple[int, int]:
    """(sequences of a step, of a micro-batch) near ``wanted`` sequences with micro-batches of at most ``most``.

    The step moves by up to `MOVED` to be whole micro-batches of nearly that size. 19 sequences in micro-batches of up to 16
    become 20 = 2 x 10, because 19 is prime and would be 19 micro-batches of one."""
    batch = max(1, round(wanted))
    count = math.ceil(batch / most)
    near = max(1, round(wanted / count)) * count
    if abs(near - wanted) <= MOVED * wanted:
        return near, near // count
    return batch, max(m for m in range(1, most + 1) if batch % m == 0)


def _recipe(config: RunConfig, model: ModelConfig, run: Any, shortest: float) -> dict[str, Any]:
    """The recipe of one small run: the large run's, with this run's model, duration, learning rate and batch size. The
    warm-up must fit into the shortest run that shares its trunk, which has ``shortest`` tokens."""
    values = config.model_dump(mode="json", exclude_none=True)
    sequence, micro = config.data.sequence_length, config.training.micro_batch_size
    batch, micro = _batch(run.batch_tokens / sequence, micro)
    tokens = max(round(run.tokens), batch * sequence)
    schedule, whole = config.schedule, config.training.train_tokens
    values |= {"model": model.model_dump(mode="json"), "sample_prompt": ""}
    values["training"] |= {"train_tokens": tokens, "global_batch_size": batch, "micro_batch_size": micro}
    values["optimizer"]["learning_rate"] = run.learning_rate
    values["schedule"] |= {
        "warmup_tokens": int(schedule.warmup_tokens / whole * min(tokens, shortest)),
        "decay_tokens": max(1, int(schedule.decay_tokens / whole * tokens)) if schedule.decay_tokens else 0,
        "min_learning_rate": schedule.min_learning_rate * run.learning_rate / config.optimizer.learning_rate,
    }
    values["checkpoint"] |= {"export_hf": False, "keep": 1}
    values["parallel"] = {}
    return values


def write_recipes(
    config: RunConfig, models: list[ModelConfig], runs: list[Any], output: Path
) -> tuple[dict[str, str], list]:
    """(text of each recipe by file name, rows of the table)."""
    names = [f"run_{number:03d}" for number in range(len(runs))]
    shortest: dict[int, float] = {}
    for place, run in enumerate(runs):
        trunk = place if run.trunk is None else run.trunk
        shortest[trunk] = min(shortest.get(trunk, run.tokens), run.tokens)
    drafts = []
    for place, (run, model) in enumerate(zip(runs, models, strict=True)):
        trunk = place if run.trunk is None else run.trunk
        drafts.append(_recipe(config, model, run, shortest[trunk]) | {"run_dir": str(output / "runs" / names[place])})
    branches: dict[int, int] = {}
    for place, run in enumerate(runs):
        if run.trunk is None:
            continue
        draft, trunk = drafts[place], drafts[run.trunk]
        per_step = draft["training"]["global_batch_size"] * draft["data"]["sequence_length"]
        step = (draft["training"]["train_tokens"] - draft["schedule"]["decay_tokens"]) // per_step
        last = (trunk["training"]["train_tokens"] - trunk["schedule"]["decay_tokens"]) // per_step
        step = min(step, last)
        if step < 1:
            continue  # too short to branch off: it runs from the start
        branches[place] = step
        draft["data"]["order_tokens"] = trunk["training"]["train_tokens"]
        draft["checkpoint"]["branch_from"] = str(Path(trunk["run_dir"]) / CHECKPOINTS / f"step_{step:08d}")
        trunk["checkpoint"]["keep_steps"] = sorted({*trunk["checkpoint"].get("keep_steps", ()), step})
    recipes, rows = {}, []
    for place, (run, draft) in enumerate(zip(runs, drafts, strict=True)):
        recipe = parse_config(draft, f"ladder run {names[place]}")
        recipes[f"{names[place]}.yaml"] = dump_config(recipe)
        trained = recipe.train_steps - branches.get(place, 0)
        rows.append(
            {
                "recipe": f"{names[place]}.yaml",
                "after": f"{names[run.trunk]}.yaml" if place in branches else "",
                "group": run.group,
                "n_total": run.n_total,
                "n_active": run.n_active,
                "tokens": recipe.training.train_tokens,
                "seq_len": recipe.data.sequence_length,
                "learning_rate": run.learning_rate,
                "batch_size": recipe.training.global_batch_size,
                "flops": 6 * run.n_active * trained * recipe.tokens_per_step,
            }
        )
    return recipes, rows


def run(args: argparse.Namespace) -> int:
    from scaling_laws.fitting import load_fit
    from scaling_laws.ladder import PATTERNS, design_ladder

    config = load_config(args.recipe, args.overrides)
    check_target(config, "qwen-moe scaling ladder")
    check_new(args.output)
    models = smaller_models(config.model)
    if len(models) < 3:
        raise UserError(
            f"{args.recipe}: its model has only {counted(len(models), 'smaller size')} in steps of 1.5 times, and a "
            "ladder needs 3: give the recipe of a larger model (more layers and KV heads)"
        )
    sizes, target = [size_of(model) for model in models], target_of(config)
    prior = None
    if args.fit is not None and (prior := load_fit(args.fit).surface) is None:
        raise UserError(
            f"--fit {args.fit}: its runs have no learning_rate and batch_size, so it does not say where to start: give "
            "another fit, or leave the option out to start from published laws"
        )
    ratios = sorted(set(args.tokens_per_parameter))
    if len(ratios) < 2:
        raise UserError(f"--tokens-per-parameter {ratios[0]:g}: a ladder needs two durations or more, such as 20 40")
    pattern = PATTERNS[args.pattern]
    design = design_ladder(target, sizes, ratios, args.flops_budget, prior, _decay_share(config), pattern)
    chosen = [models[sizes.index((small.n_total, small.n_active))] for small in design.runs]
    recipes, rows = write_recipes(config, chosen, design.runs, args.output)
    write_ladder(args.output, recipes, rows)
    facts = {
        "runs": len(rows),
        "groups": len({small.group for small in design.runs}),
        "flops": sum(row["flops"] for row in rows),
        "branches": sum(bool(row["after"]) for row in rows),
        "expected_excess_before": design.excess[0],
        "expected_excess_after": design.excess[-1],
        "noise": design.noise,
        "log_deviation": {"learning_rate": design.deviation[0], "batch_size": design.deviation[1]},
        "too_far": _too_far(design.runs, target),
        "output": str(args.output),
    }
    print(json.dumps(facts) if args.json else _text(facts, rows, target))
    return 0


def check_target(config: RunConfig, verb: str) -> None:
    """Raises UserError for a large run whose loss and length are none that small runs can tell."""
    refuse_stages(config, verb)
    if (unit := config.objective.unit) != "nats per token":
        raise UserError(
            f"`{verb}` is for losses in nats per token, and those of objective.kind {config.objective.kind} are {unit}: "
            "give the recipe of a pre-training run"
        )
    if not config.training.train_tokens:
        raise UserError(
            f"`{verb}` needs the tokens of the large run, and this recipe gives training.epochs: give training.train_tokens "
            "instead"
        )


def check_new(output: Path) -> None:
    """Raises UserError if recipes cannot be written to ``output`` without mixing them up with others."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a new or empty folder")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty: give another folder, so that recipes are not mixed up")


def size_of(model: ModelConfig) -> tuple[float, float]:
    """(n_total, n_active), as tables of runs count them: without embedding and head."""
    counts = count_parameters(model)
    return float(counts.non_vocabulary_total), float(counts.non_vocabulary_activated)


def target_of(config: RunConfig) -> tuple[float, float, float]:
    """(n_total, n_active, tokens) of the run to recommend for."""
    return (*size_of(config.model), float(config.training.train_tokens))


def _too_far(runs: Sequence[Any], target: tuple[float, float, float]) -> list[str]:
    """In which quantities the large run is so far from the small ones that `scaling recommend` will refuse it."""
    from scaling_laws.recommend import quantities, times_outside, too_far

    covered = [quantities(run.n_total, run.n_active, run.tokens) for run in runs]
    ranges = {name: (min(one[name] for one in covered), max(one[name] for one in covered)) for name in covered[0]}
    wanted = quantities(*target)
    return [
        f"{text}{BELOW}" if wanted[text.split()[0]] < ranges[text.split()[0]][0] else text
        for text in too_far(times_outside(ranges, wanted))
    ]


def far_text(too_far: Sequence[str]) -> str:
    """What follows from `_too_far`; "" if nothing does."""
    if not too_far:
        return ""
    fix = "a larger --flops-budget pays for larger and longer runs"
    if all(text.endswith(BELOW) for text in too_far):
        fix = "runs like it need a smaller --flops-budget or, of `scaling ladder`, smaller --tokens-per-parameter"
    where = "; ".join(too_far)
    return f"the large run is far from these: {where}. `scaling recommend` will need --accept-extrapolation; {fix}"


def write_ladder(output: Path, recipes: dict[str, str], rows: list[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone(output, "wait for it, or give another --output"):
        check_new(output)  # another process may have written there since
        for name, text in {**recipes, TABLE: table.getvalue()}.items():
            write_text(output / name, text)


def _text(facts: dict[str, Any], rows: list[dict[str, Any]], target: tuple[float, float, float]) -> str:
    lines = [
        f"target: N {target[0]:.3g} ({target[1]:.3g} activated), D {target[2]:.3g} tokens, "
        f"{6 * target[1] * target[2]:.3g} FLOPs",
        f"{'size':>10s} {'activated':>10s} {'tokens':>10s} {'runs':>5s} {'FLOPs':>9s}",
    ]
    for group in range(facts["groups"]):
        mine = [row for row in rows if row["group"] == group]
        first = mine[0]
        cost = sum(row["flops"] for row in mine)
        lines.append(
            f"{first['n_total']:10.3g} {first['n_active']:10.3g} {first['tokens']:10.3g} {len(mine):5d} {cost:9.2g}"
        )
    deviation, shown = facts["log_deviation"], shlex.quote(facts["output"])
    lines += [
        f"{counted(facts['runs'], 'run')}, {facts['flops']:.3g} FLOPs (6 N_active D) in all"
        + (
            f"; {counted(facts['branches'], 'branches', 'branch')} off longer ones where the decay begins"
            if facts["branches"]
            else ""
        ),
        f"expected excess loss of the recommendation at the target: {facts['expected_excess_before']:.3%} with the prior "
        f"alone, {facts['expected_excess_after']:.3%} with these runs, if losses vary by "
        f"{facts['noise']:.2%} between seeds",
        f"(learning rate known to a factor of {2.718281828 ** deviation['learning_rate']:.2f}, batch size to "
        f"{2.718281828 ** deviation['batch_size']:.2f}, one standard deviation)",
        *filter(None, [far_text(facts["too_far"])]),
        f"recipes and {TABLE} in {facts['output']}. Next: `qwen-moe launch {shown} --local` (or --array), "
        f"`qwen-moe scaling collect {shown} --output runs.csv`, `qwen-moe scaling fit runs.csv --output fit`",
    ]
    return "\n".join(lines)
