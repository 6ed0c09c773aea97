"""`qwen-moe report RUN_DIR`: a run's figures and pictures from its metrics.jsonl."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.folder.atomic import replaced
from qwen_moe.config import ObjectiveConfig, load_config
from qwen_moe.errors import UserError, explain_failure
from qwen_moe.packages import missing_text
from qwen_moe.runs import task_scores
from qwen_moe.runs.records import RESOLVED

NEEDED = (
    "tokens",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "model_flops_per_second",
    "share_of_peak",
    "memory_bytes",
)
_AT_LENGTH, _OF_SET = "validation_loss_", "validation_loss/"
LOSS_PICTURE = "loss.png"
REWARD_PICTURE = "reward.png"
LOAD_PICTURE = "expert_load.png"
TASKS_PICTURE = "tasks.png"


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("report", help="draw a run's loss curve and expert load, print its figures")
    parser.add_argument("run_dir", type=Path, help="the folder of a run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    facts = summarize(args.run_dir)
    facts["pictures"] = draw_if_possible(args.run_dir)
    sys.stdout.write((json.dumps(facts, indent=1) if args.json else as_text(facts)) + "\n")
    return 0


def _records(run_dir: Path) -> list[dict[str, Any]]:
    from launchers.folder.run_folder import METRICS
    from qwen_moe.config.writers import writer
    from qwen_moe.runs.records import read_lines

    path = run_dir / METRICS
    if not run_dir.exists():
        raise UserError(f"{run_dir} does not exist: give the run_dir of a run{writer(run_dir)}")
    if not path.exists():
        raise UserError(f"{run_dir} holds no {METRICS}: give the run_dir of a run that has trained at least one step")
    records = read_lines(path)
    if not any("loss" in record for record in records):
        raise UserError(f"{path} has no training step yet: wait for the first one")
    for record in records:
        needed = [*(NEEDED if "loss" in record else ()), *(("used_answers",) if "reward" in record else ())]
        absent = [name for name in needed if name not in record]
        rates = [
            record.get(name, 1) for name in ("step", "step_seconds", "tokens_per_second", "model_flops_per_second")
        ]
        if absent or ("loss" in record and min(rates) <= 0):
            wrong = f"lacks {', '.join(absent)}" if absent else "has no step or speed"
            raise UserError(
                f"{path}: the record of step {record['step']} {wrong}: it was not written by `qwen-moe train`"
            )
    return records


def _objective(run_dir: Path) -> ObjectiveConfig:
    """What the run minimizes; the default where its recipe is not there."""
    path = run_dir / RESOLVED
    return load_config(path).objective if path.is_file() else ObjectiveConfig()


def summarize(run_dir: Path) -> dict[str, Any]:
    """The figures of a run: last and validation loss and their unit, speed, memory, expert imbalance."""
    records = _records(run_dir)
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    last = steps[-1]
    within = [record for record in steps if record.get("stage") == last.get("stage")]
    # The first steps warm up caches, so the speed is the median of the others.
    timed = within[5:] or within
    seconds = sorted(record["step_seconds"] for record in timed)[len(timed) // 2]
    tokens_per_step = _tokens_per_step(within)
    per_token = last["model_flops_per_second"] / last["tokens_per_second"]
    facts: dict[str, Any] = {
        "run_dir": str(run_dir),
        "step": last["step"],
        "tokens": last["tokens"],
        "loss": last["loss"],
        "unit": _objective(run_dir).unit,
        "validation_loss": validations[-1]["validation_loss"] if validations else None,
        "validation_sets": (sets_validated(records) or [{}])[-1],
        "stages": stages_of(records),
        "tokens_per_second": tokens_per_step / seconds,
        "model_flops_per_second": tokens_per_step / seconds * per_token,
        "share_of_peak": tokens_per_step / seconds * per_token * last["share_of_peak"] / last["model_flops_per_second"],
        "memory_bytes": last["memory_bytes"],
    }
    if "expert_imbalance_max" in last and "balance_loss" in last:
        facts["expert_imbalance_max"] = last["expert_imbalance_max"]
        facts["balance_loss"] = last["balance_loss"]
    if scores := task_scores.read(run_dir):
        facts["tasks"] = scores
    return facts | _of_pairs(steps) | _of_samples(records, timed)


def _of_pairs(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run that learns from pairs: in what share of them the model prefers the chosen answer, in the last quarter of
    steps. The last step alone says little: an epoch may end with a few pairs. Nor do the first: DPO begins with ties."""
    shares = [record["accuracy"] for record in steps if "accuracy" in record]
    last = shares[-(len(shares) // 4 or 1) :]
    return {"accuracy_last": sum(last) / len(last)} if last else {}


def _of_samples(records: list[dict[str, Any]], timed: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run that learns from its own samples: rewards, its speed in tokens without padding, and the steps that had
    nothing to learn from, whose speed says nothing."""
    rewards = [record["reward"] for record in records if "reward" in record]
    if not rewards:
        return {}
    tenth = max(1, len(rewards) // 10)
    timed = [record for record in timed if record.get("used_answers")] or timed
    speed = sorted(record["tokens_per_second"] for record in timed)[len(timed) // 2]
    last = timed[-1]
    per_token, peak = last["model_flops_per_second"] / last["tokens_per_second"], last["share_of_peak"]
    facts: dict[str, Any] = {
        "reward_first": sum(rewards[:tenth]) / tenth,
        "reward_last": sum(rewards[-tenth:]) / tenth,
        "tokens_per_second": speed,
        "model_flops_per_second": speed * per_token,
        "share_of_peak": speed * peak / last["tokens_per_second"],
        "steps_without_learning": steps_without_learning(records),
    }
    held_out = [record["held_out_reward"] for record in records if "held_out_reward" in record]
    return facts | ({"held_out_first": held_out[0], "held_out_last": held_out[-1]} if held_out else {})


def steps_without_learning(records: list[dict[str, Any]]) -> int:
    """How many of a run's steps had nothing to learn from: all answers to each query had the same reward."""
    return sum(record.get("used_answers") == 0 for record in records)


def _tokens_per_step(steps: list[dict[str, Any]]) -> float:
    """Of the steps of one stage, which are equally large; the first stage begins with no tokens."""
    first, last = steps[0], steps[-1]
    if last["step"] > first["step"] and last.get("stage"):
        return (last["tokens"] - first["tokens"]) / (last["step"] - first["step"])
    if last.get("stage"):
        return last["tokens_per_second"] * last["step_seconds"]
    return last["tokens"] / last["step"]


def lengths_validated(record: dict[str, Any]) -> dict[int, float]:
    """Validation losses of a record by sequence length; empty in a run without stages."""
    found = {key.removeprefix(f"{_AT_LENGTH}"): value for key, value in record.items() if key.startswith(_AT_LENGTH)}
    return {int(length): value for length, value in found.items() if length.isdecimal()}


def sets_validated(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The losses of named validation sets, of each record that has some."""
    found = [{k.removeprefix(_OF_SET): v for k, v in record.items() if k.startswith(_OF_SET)} for record in records]
    return [losses for losses in found if losses]


def stages_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages that have begun: name, steps, sequence length, and the last validation loss at every length."""
    found: list[dict[str, Any]] = []
    for record in records:
        if "loss" in record and record.get("stage"):
            if not found or found[-1]["name"] != record["stage"]:
                length = record.get("sequence_length", 0)
                found.append({"name": record["stage"], "first_step": record["step"], "sequence_length": length})
                found[-1]["validation_losses"] = {}
            found[-1] |= {"last_step": record["step"], "tokens": record["tokens"]}
        elif found and (losses := lengths_validated(record)):
            found[-1]["validation_losses"] = losses
    return found


def as_text(facts: dict[str, Any]) -> str:
    """Human-readable summary of the figures."""
    lines = [f"{facts['run_dir']}: step {facts['step']:,}, {facts['tokens']:,} tokens"]
    if "reward_last" not in facts:  # the loss of a policy that learns from its own samples is near 0 and says nothing
        lines.append(f"  training loss     {facts['loss']:.4f} {facts['unit']}")
    if "accuracy_last" in facts:
        lines.append(
            f"  accuracy          the chosen answer is preferred in {facts['accuracy_last']:.0%} of pairs, in the last "
            "quarter of steps (50% by guessing)"
        )
    if "reward_last" in facts:
        lines.append(
            f"  reward            {facts['reward_first']:.4f} in the first tenth, {facts['reward_last']:.4f} in the last"
        )
    if silent := facts.get("steps_without_learning"):
        lines.append(
            f"  not learned       in {silent:,} of {counted(facts['step'], 'step')}: all answers to each query had the same "
            "reward"
        )
    if "held_out_last" in facts:
        lines.append(
            f"  held-out reward   {facts['held_out_first']:.4f} at first, {facts['held_out_last']:.4f} at last (greedy)"
        )
    if facts["validation_loss"] is not None:
        lines.append(f"  validation loss   {facts['validation_loss']:.4f}")
    if facts["validation_sets"]:
        losses = ", ".join(f"{loss:.4f} of {name}" for name, loss in facts["validation_sets"].items())
        lines.append(f"  validation sets   {losses}")
    for stage in facts.get("stages", []):
        losses = ", ".join(f"{loss:.4f} at {length:,}" for length, loss in stage["validation_losses"].items())
        lines.append(
            f"  stage             {stage['name']}: steps {stage['first_step']:,} to {stage['last_step']:,} of "
            f"{stage['sequence_length']:,} tokens" + (f"; validation loss {losses}" if losses else "")
        )
    lines += task_scores.as_lines(facts.get("tasks", {}))
    lines.append(
        f"  speed             {facts['tokens_per_second']:,.0f} tokens/s, {facts['model_flops_per_second'] / 1e9:,.1f} "
        f"GFLOP/s of the model, {facts['share_of_peak']:.0%} of the measured matmul peak"
    )
    lines.append(f"  memory            {facts['memory_bytes'] / 1e9:.2f} GB at most in one process")
    if "balance_loss" in facts:
        lines.append(
            f"  expert load       fullest expert {facts['expert_imbalance_max']:.0%} above the mean; balance loss "
            f"{facts['balance_loss']:.3f} (1 is perfectly even)"
        )
    lines.extend(f"  picture           {path}" for path in facts.get("pictures", []))
    return "\n".join(lines)


def draw_if_possible(run_dir: Path) -> list[str]:
    """Draw the pictures and return their paths. If they cannot be drawn, print one line to stderr and return none: a
    finished run does not depend on them."""
    if missing := missing_text("matplotlib"):
        print(f"no pictures: {missing}; then `qwen-moe report {run_dir}` draws them", file=sys.stderr)
        return []
    try:
        return [str(path) for path in draw(run_dir)]
    except UserError:
        raise
    except Exception as error:  # a full disk, or a broken matplotlib
        why = explain_failure(error) or f"{type(error).__name__}: {error}"
        print(f"no pictures in {run_dir}: {why}; `qwen-moe report {run_dir}` draws them", file=sys.stderr)
        return []


def draw(run_dir: Path) -> list[Path]:
    """Write loss.png and, where there is something to show, reward.png, expert_load.png (of MoE models) and tasks.png into
    the run folder. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    records = _records(run_dir)
    paths = [_draw_loss(records, _objective(run_dir).unit, run_dir / LOSS_PICTURE)]
    if any("reward" in record for record in records):
        paths.append(_draw_reward(records, run_dir / REWARD_PICTURE))
    loads = [record for record in records if "expert_counts" in record]
    if loads:
        paths.append(_draw_load(records, loads, run_dir / LOAD_PICTURE))
    if scores := task_scores.read(run_dir):
        paths.append(_save(task_scores.drawn(scores), run_dir / TASKS_PICTURE))
    return paths


def _draw_loss(records: list[dict[str, Any]], unit: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    steps = [record for record in records if "loss" in record]
    tokens = [record["tokens"] / 1e6 for record in steps]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    upper.plot(tokens, [record["loss"] for record in steps], color="tab:blue", linewidth=1, label="training")
    _draw_validation(upper, records, {record["step"]: record["tokens"] / 1e6 for record in steps})
    upper.set_ylabel(f"loss ({unit})")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(tokens, [record["learning_rate"] for record in steps], color="tab:green")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("training tokens (millions)")
    lower.grid(alpha=0.3)
    _draw_borders(upper, lower, steps)
    return _save(figure, path)


def _draw_reward(records: list[dict[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt

    steps = [record for record in records if "reward" in record]
    held_out = [record for record in records if "held_out_reward" in record]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    upper.plot([r["step"] for r in steps], [r["reward"] for r in steps], linewidth=1, label="sampled answers, mean")
    if held_out:
        places, values = [r["step"] for r in held_out], [r["held_out_reward"] for r in held_out]
        upper.plot(places, values, "o-", label=f"greedy answers to held-out queries (last {values[-1]:.3f})")
    upper.set_ylabel("reward")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot([r["step"] for r in steps], [r["used_answers"] for r in steps], linewidth=1, color="tab:green")
    lower.set_ylabel("used answers")
    lower.set_ylim(0, 1)
    lower.set_xlabel("step")
    lower.grid(alpha=0.3)
    return _save(figure, path)


def _draw_validation(axes: Any, records: list[dict[str, Any]], tokens: dict[int, float]) -> None:
    """One curve, or one for each sequence length of a run of stages, and one for each named set."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        at = tokens.get(record["step"])
        if at is None:
            continue
        losses = {f"at {counted(length, 'token')}": loss for length, loss in sorted(lengths_validated(record).items())}
        if not losses and "validation_loss" in record:
            losses[""] = record["validation_loss"]
        losses |= {f"of {name}": loss for some in sets_validated([record]) for name, loss in some.items()}
        for name, loss in losses.items():
            curves.setdefault(name, []).append((at, loss))
    colors = ("tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
    for number, (name, points) in enumerate(curves.items()):
        label = f"validation {name}".strip() + f" (last {points[-1][1]:.3f})"
        axes.plot(*zip(*points, strict=True), "o-", color=colors[number % len(colors)], label=label)


def _draw_borders(upper: Any, lower: Any, steps: list[dict[str, Any]]) -> None:
    """A line where each stage begins, and its name."""
    before = 0.0
    for number, stage in enumerate(stages_of(steps)):
        if number:
            for axes in (upper, lower):
                axes.axvline(before, color="gray", linestyle="--", linewidth=1)
        upper.annotate(
            f"{stage['name']}\n{stage['sequence_length']:,} tokens",
            (before, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="dimgray",
        )
        before = stage["tokens"] / 1e6


def _draw_load(records: list[dict[str, Any]], loads: list[dict[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt
    import numpy as np

    counts = np.array(loads[-1]["expert_counts"], dtype=float)
    relative = counts / counts.mean(axis=1, keepdims=True)
    steps = [r for r in records if "expert_imbalance_max" in r and "expert_imbalance_mean" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2), layout="constrained")
    image = left.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    left.set_xlabel("expert")
    left.set_ylabel("MoE layer")
    left.set_title(f"tokens per expert relative to the layer's mean, step {loads[-1]['step']}")
    figure.colorbar(image, ax=left, label="1 = even, 2 = twice the mean")
    for key, label in (("expert_imbalance_max", "worst layer"), ("expert_imbalance_mean", "mean of layers")):
        right.plot([record["step"] for record in steps], [record[key] for record in steps], label=label)
    right.set_xlabel("step")
    right.set_ylabel("fullest expert / mean - 1")
    right.set_ylim(bottom=0)
    right.set_title("imbalance")
    right.legend()
    right.grid(alpha=0.3)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return path
