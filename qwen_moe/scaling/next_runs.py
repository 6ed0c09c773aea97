"""`qwen-moe scaling next`: which runs to do after those in a table, and whether another run is worth its price."""

import argparse
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted
from qwen_moe.config import load_config
from qwen_moe.errors import UserError
from qwen_moe.options import number, whole
from qwen_moe.scaling.ladder import (
    TABLE,
    add_durations,
    check_new,
    check_target,
    size_of,
    smaller_models,
    target_of,
    write_ladder,
    write_recipes,
)

if TYPE_CHECKING:
    from scaling_laws.next_runs import Advice, Prices

MOST_RUNS = 100


def register(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("next", help="write the recipes of the runs that teach most, or say when to stop")
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the large run's recipe, as for `ladder`")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe to override")
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="RUNS.csv", help="the runs so far")
    parser.add_argument("--count", type=whole(1, MOST_RUNS), default=9, help="the most runs (default: 9)")
    parser.add_argument("--flops-budget", type=number(above=0), help="the most that they may take, 6 N_active D")
    add_durations(parser)
    parser.add_argument("--price", type=number(above=0), help="of a GPU-hour, in any currency")
    parser.add_argument(
        "--run-speed", type=number(above=0), metavar="FLOPS_PER_SECOND", help="of a GPU in the small runs, 6 N_active D"
    )
    parser.add_argument(
        "--target-speed", type=number(above=0), metavar="FLOPS_PER_SECOND", help="of a GPU in the large run"
    )
    parser.add_argument(
        "--no-prior", action="store_true", help="use what laboratories publish only for what the table does not tell"
    )
    parser.add_argument("--without-laboratory", action="append", default=[], metavar="NAME", help="as for `fit`")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the runs' recipes there, as `ladder` does")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run, needs=("scipy", "pandas"))


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """What runs are paid with. ``noun`` follows an amount."""

    prices: "Prices"
    noun: str

    def text(self, amount: float) -> str:
        return f"{amount:.3g} {self.noun}"


def _unit(args: argparse.Namespace) -> _Unit:
    from scaling_laws.next_runs import Prices

    speeds = (args.run_speed, args.target_speed)
    if speeds == (None, None):
        if args.price is not None:
            raise UserError(
                f"--price {args.price:g} is of a GPU-hour: give --run-speed and --target-speed, too, the FLOPs (6 N_active "
                "D) that a GPU does in a second of the small runs and of the large one"
            )
        return _Unit(prices=Prices(), noun="FLOPs")
    if None in speeds:
        raise UserError("give both --run-speed and --target-speed, or neither")
    hour = 3600 * args.run_speed, 3600 * args.target_speed
    price = 1.0 if args.price is None else args.price
    prices = Prices(run=price / hour[0], target=price / hour[1])
    return _Unit(prices=prices, noun="GPU-hours" if args.price is None else f"at {args.price:g} a GPU-hour")


def run(args: argparse.Namespace) -> int:
    from scaling_laws.laboratories import laboratory_prior
    from scaling_laws.next_runs import next_runs
    from scaling_laws.runs import read_runs
    from scaling_laws.surface_fit import posterior

    config = load_config(args.recipe, args.overrides)
    check_target(config, "qwen-moe scaling next")
    if args.output is not None:
        check_new(args.output)
    unit = _unit(args)
    models = smaller_models(config.model)
    if not models:
        raise UserError(
            f"{args.recipe}: its model has no size that is smaller by 1.5 times: give the recipe of a larger model (more "
            "layers and KV heads)"
        )
    prior = laboratory_prior(args.without_laboratory, removed=args.no_prior)
    table = read_runs(args.runs)
    if not table.has_hyperparameters:
        raise UserError(
            f"{args.runs[0]}: the runs have no learning_rate, batch_size and seq_len, which say what further runs would "
            "teach: add these columns"
        )
    sizes, target = [size_of(model) for model in models], target_of(config)
    ratios = sorted(set(args.tokens_per_parameter))
    budget = float("inf") if args.flops_budget is None else args.flops_budget
    sequence = config.data.sequence_length
    advice = next_runs(
        posterior(table.frame, prior),
        target,
        sizes,
        ratios,
        count=args.count,
        flops=budget,
        prices=unit.prices,
        sequence=sequence,
    )
    if not advice.runs:
        cheapest = 6 * sizes[-1][1] ** 2 * ratios[0]
        raise UserError(_why_none(budget, cheapest, sequence))
    rows: list[dict[str, Any]] = []
    if args.output is not None and not advice.stop:
        chosen = [models[sizes.index((one.n_total, one.n_active))] for one in advice.runs]
        recipes, rows = write_recipes(config, chosen, advice.runs, args.output)
        write_ladder(args.output, recipes, rows)
    if args.json:
        facts = asdict(advice) | {"stop": advice.stop, "unit": unit.noun, "runs_so_far": len(table.frame)}
        print(json.dumps(facts | {"output": str(args.output) if rows else None, "warnings": table.warnings}))
        return 0
    print("\n".join([*(f"note: {note}" for note in table.warnings), *_text(advice, unit, target, len(table.frame))]))
    if rows:
        print(_afterwards(args.output, args.runs))
    return 0


def _why_none(budget: float, cheapest: float, sequence: int) -> str:
    """Why no run can be advised. ``cheapest``: FLOPs of the cheapest run."""
    if budget < cheapest:
        return f"--flops-budget {budget:.3g} pays for no run: the cheapest takes {cheapest:.3g} FLOPs (6 N_active D)"
    return (
        "no run can be given: at every size and duration that is paid for, runs around the best batch would need less than "
        f"one sequence of {sequence} tokens: give larger --tokens-per-parameter, or shorter sequences"
    )


def _text(advice: "Advice", unit: _Unit, target: tuple[float, float, float], so_far: int) -> list[str]:
    from math import exp

    rate, batch = advice.deviation
    lines = [
        f"target: N {target[0]:.3g} ({target[1]:.3g} activated), D {target[2]:.3g} tokens, "
        f"{unit.text(advice.target_cost)}; {counted(so_far, 'run')} so far",
        f"expected excess loss of a recommendation from them: {advice.excess:.3%} (learning rate known to a factor of "
        f"{exp(rate):.2f}, batch size to {exp(batch):.2f}, one standard deviation). The target would need "
        f"{advice.excess_worth / advice.target_cost:.1%} more tokens to make up for it, {unit.text(advice.excess_worth)}",
        f"{'size':>10s} {'activated':>10s} {'tokens':>10s} {'learning rate':>14s} {'batch tokens':>13s} {'FLOPs':>9s}",
    ]
    for one in advice.runs:
        lines.append(
            f"{one.n_total:10.3g} {one.n_active:10.3g} {one.tokens:10.3g} {one.learning_rate:14.3g} "
            f"{one.batch_tokens:13,.0f} {one.flops:9.2g}"
        )
    cost, worth = unit.text(advice.cost), unit.text(advice.worth)
    then = f"they cost {cost}, and lower the expected excess to {advice.excess_after:.3%}, which is worth {worth}"
    if advice.stop:
        return [*lines, f"stop: these are the most useful runs for their price. {then}: less than they cost"]
    return [*lines, f"these runs are next: {then}"]


def _afterwards(output: Path, runs: list[Path]) -> str:
    table, shown = shlex.quote(f"{output.name}.csv"), shlex.quote(str(output))
    tables = " ".join([*(shlex.quote(str(path)) for path in runs), table])
    return (
        f"recipes and {TABLE} in {output}. Next: `qwen-moe launch {shown} --local` (or --array), `qwen-moe scaling collect "
        f"{shown} --output {table}`, then this command again with `--runs {tables}`, until it says stop"
    )
