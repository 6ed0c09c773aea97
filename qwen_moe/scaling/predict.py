"""`qwen-moe scaling predict`: predicts the final loss of running runs, and says which are not worth finishing."""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_moe.errors import UserError
from qwen_moe.options import number

if TYPE_CHECKING:
    from scaling_laws.curves import Curve

# The surface does not use runs this far above their group's best (scaling_laws.surface.WINDOW).
HOPELESS = 0.05


def register(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    predict = verbs.add_parser("predict", help="predict the final loss of running runs from their curves so far")
    what = "run_dir, or a CSV with step, learning_rate, loss"
    predict.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help=f"{what}, with one row per step to the run's end"
    )
    predict.add_argument(
        "--like", nargs="+", type=Path, default=[], metavar="RUN", help="finished runs to learn from; give a few"
    )
    predict.add_argument(
        "--hopeless-above", type=number(above=0), metavar="LOSS", help="runs that surely end above it are hopeless"
    )
    predict.add_argument("--json", action="store_true", help="print the result as JSON")
    predict.set_defaults(func=run, needs=("scipy",))


def open_curve(path: Path) -> tuple["Curve", tuple[Any, ...] | None]:
    """(curve of a run directory or CSV, the group that it is compared in). A group is (n_total, n_active, tokens), or None
    for a CSV. Raises UserError."""
    import numpy as np

    from launchers.folder.run_folder import METRICS
    from qwen_moe.config import load_config, refuse_stages
    from qwen_moe.models.flops import count_parameters
    from qwen_moe.runs.records import RESOLVED, read_lines
    from qwen_moe.training.schedule import learning_rate
    from scaling_laws.curves import Curve, read_curve

    if not path.exists():
        raise UserError(f"{path} does not exist: give the run_dir of a run, or a CSV with step, learning_rate, loss")
    if path.is_file():
        return read_curve(path), None
    for name in (RESOLVED, METRICS):
        if not (path / name).is_file():
            raise UserError(f"{path} has no {name}: give the run_dir of a run that has trained some steps")
    config = load_config(path / RESOLVED)
    refuse_stages(config, "qwen-moe scaling predict")
    records = read_lines(path / METRICS)
    found = {record["step"]: record["loss"] for record in records if "loss" in record}
    last = max(found, default=0)
    if last > config.train_steps or min(found, default=1) < 1:
        raise UserError(
            f"{path / METRICS} records step {last}, but the run has {config.train_steps}: does it belong to another run?"
        )
    loss = np.full(last, np.nan)
    for step, value in found.items():
        loss[step - 1] = value
    rates = np.array([learning_rate(config, step) for step in range(config.train_steps)])
    size = count_parameters(config.model)
    group = (size.non_vocabulary_total, size.non_vocabulary_activated, config.training.train_tokens)
    return Curve(name=str(path), learning_rate=rates, loss=loss), group


def run(args: argparse.Namespace) -> int:
    from scaling_laws.curves import predict_final_loss

    like = [open_curve(path)[0] for path in args.like]
    for curve in like:
        if curve.done < 1:
            raise UserError(f"--like {curve.name} has done {curve.done:.0%} of its steps: give finished runs")
    opened = [open_curve(path) for path in args.runs]
    rows = []
    for curve, group in opened:
        found = predict_final_loss(curve, like)
        rows.append(
            {
                "run": curve.name,
                "done": curve.done,
                "predicted_loss": found.final,
                "interval": [found.low, found.high],
                "by_law": found.by_law,
                "backtest_error": found.backtest,
                "blew_up": found.blew_up,
                "group": group,
            }
        )
    _judge(rows, args.hopeless_above)
    print(json.dumps(rows) if args.json else _text(rows, bool(like)))
    return 0


def _judge(rows: list[dict[str, Any]], limit: float | None) -> None:
    """Mark runs as hopeless that surely end above ``limit``, or more than `HOPELESS` above what another run of their group
    surely reaches."""
    best: dict[Any, float] = defaultdict(lambda: math.inf)
    for row in rows:
        if row["group"] is not None:
            best[row["group"]] = min(best[row["group"]], row["interval"][1])
    for row in rows:
        reach = best[row.pop("group")]
        row["hopeless"] = row["interval"][0] > min(reach * (1 + HOPELESS), math.inf if limit is None else limit)


def _text(rows: list[dict[str, Any]], learnt: bool) -> str:
    width = max(len(row["run"]) for row in rows)
    lines = [f"{'run':{width}s} {'done':>5s} {'final loss':>10s} {'95%':>17s} {'backtest':>9s}"]
    for row in rows:
        low, high = row["interval"]
        tried = f"{row['backtest_error']:+.2%}" if row["backtest_error"] is not None else "too early"
        verdict = "  blew up" if row["blew_up"] else "  hopeless" if row["hopeless"] else ""
        lines.append(
            f"{row['run']:{width}s} {row['done']:5.0%} {row['predicted_loss']:10.4f} {low:8.4f} {high:8.4f} "
            f"{tried:>9s}{verdict}"
        )
    lines.append("backtest: error when the end of the known curve is predicted from its first two thirds")
    if any(row["blew_up"] for row in rows):
        lines.append(
            "blew up: the newest losses are far above the curve of the earlier ones, and the prediction is of a run that "
            "recovers"
        )
    if finished := [row["run"] for row in rows if row["done"] == 1 and not Path(row["run"]).is_dir()]:
        lines.append(
            f"{finished[0]} ends with its last loss, so it counts as finished: of a run that goes on, give the learning "
            "rates of the steps to come, too, with empty losses"
        )
    if not learnt:
        lines.append(
            "how much the loss falls as the learning rate does is taken from publications until it is seen: "
            "--like FINISHED_RUN narrows the interval"
        )
    return "\n".join(lines)
