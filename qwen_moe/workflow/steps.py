"""The steps of a pipeline: the inputs of each, the commands it runs, and the results it keeps.

A step calls commands of `qwen-moe` as from a shell, so everything that the pipeline does can also be done by hand.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.folder.atomic import write_text
from launchers.local.supervisor import INTERRUPTED
from qwen_moe.config import RunConfig, dump_config
from qwen_moe.errors import UserError
from qwen_moe.launch.command import NOTHING_DONE
from qwen_moe.runs import identity
from qwen_moe.workflow.checks import planned_precision
from qwen_moe.workflow.state import State, Stopped, content, flat

RUNS, FIT, LADDER, RECOMMENDED, RECIPE, SCRIPT = (
    "runs.csv",
    "fit",
    "ladder",
    "recommended.yaml",
    "recipe.yaml",
    "job.sbatch",
)
TARGET = "target.yaml"
MOST_DIVISOR = 8


@dataclass
class Context:
    """What steps work with. ``commands`` are the ones that the current step has called."""

    args: argparse.Namespace
    config: RunConfig
    state: State
    parser: argparse.ArgumentParser
    commands: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.state.folder

    def call(self, *arguments: str, captured: bool = True) -> str:
        """Run a command of `qwen-moe` in this process and return its stdout. Raises Stopped unless it succeeds."""
        self.commands.append(shlex.join(["qwen-moe", *arguments]))
        parsed = self.parser.parse_args(list(arguments))
        output = io.StringIO()
        with contextlib.redirect_stdout(output) if captured else contextlib.nullcontext():
            code = parsed.func(parsed)
        if code:
            raise Stopped(code)
        return output.getvalue()

    def path(self, name: str) -> str:
        return str(self.folder / name)


@dataclass(frozen=True, kw_only=True)
class Step:
    """``cost``: lines about an expensive step, which asks before it begins; no lines if it costs nothing now. ``keeps``:
    expensive output, never made again without --redo."""

    name: str
    what: str
    inputs: Callable[[Context], dict[str, Any]]
    do: Callable[[Context], dict[str, Any]]
    cost: Callable[[Context], list[str]] | None = None
    keeps: bool = False


def _prepare_inputs(at: Context) -> dict[str, Any]:
    return flat(at.config.data.model_dump(mode="json", exclude_none=True), "data.")


def _prepare(at: Context) -> dict[str, Any]:
    """Tokenize the corpus that the recipe names, or check existing data."""
    data, found = at.config.data, []
    if data.prepare is not None:
        wanted = data.prepare
        tokenizer = ["--tokenizer", str(data.tokenizer)] if data.tokenizer is not None else ["--train-tokenizer"]
        size = ["--vocab-size", str(wanted.vocab_size)] if wanted.vocab_size and data.tokenizer is None else []
        output = ["--output", str(wanted.output), *tokenizer, *size, "--text-key", wanted.text_key]
        found.append(json.loads(at.call("data", "prepare", "--input", *wanted.input, *output, "--json")))
    for dataset in (*data.train, *data.all_validation):
        if not dataset.prefix.with_name(dataset.prefix.name + ".bin").is_file():
            raise UserError(
                f"data.train names {dataset.prefix}, but {dataset.prefix}.bin does not exist: make it by `qwen-moe data "
                f"prepare --input YOUR_FILES --output {dataset.prefix} --tokenizer DIR`, or give the prefix of other data"
            )
        found.append(json.loads(at.call("data", "info", str(dataset.prefix), "--json")))
    return {"data": [{k: v for k, v in facts.items() if k in ("prefix", "documents", "tokens")} for facts in found]}


def _ladder_inputs(at: Context) -> dict[str, Any]:
    return {"--flops-budget": at.args.flops_budget, **identity.flat(at.config, identity.OF_RESULTS)}


def _ladder(at: Context) -> dict[str, Any]:
    budget = f"{at.args.flops_budget:g}"
    # Write the resolved recipe, which includes the overrides, so that the command by hand needs only this file.
    recipe = at.folder / TARGET
    write_text(recipe, dump_config(at.config))
    output = at.call("scaling", "ladder", str(recipe), "--flops-budget", budget, "--output", at.path(LADDER), "--json")
    facts = json.loads(output)
    with (at.folder / LADDER / "ladder.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    facts["table"] = [
        {
            "n_total": float(mine[0]["n_total"]),
            "n_active": float(mine[0]["n_active"]),
            "tokens": float(mine[0]["tokens"]),
            "runs": len(mine),
            "flops": sum(float(row["flops"]) for row in mine),
        }
        for mine in groups.values()
    ]
    return facts


def _run_inputs(at: Context) -> dict[str, Any]:
    return {f"{at.path(LADDER)} (content)": content(at.folder / LADDER)}


def _run_cost(at: Context) -> list[str]:
    from qwen_moe.scaling.ladder import far_text
    from qwen_moe.workflow.cost import ladder_cost

    lines = ladder_cost(at.folder / LADDER, at.args.parallel or 1, at.args.slurm)
    far = far_text(at.state.facts("ladder").get("too_far", ()))
    return [*lines, far] if lines and far and not at.args.accept_extrapolation else lines


def _run(at: Context) -> dict[str, Any]:
    """Run the ladder, on this machine or on Slurm. Raises UserError if runs failed and --skip-failed is not given."""
    from qwen_moe.scaling.collect import collect

    folder = at.path(LADDER)
    if at.args.slurm:
        _run_on_slurm(at)
    else:
        numbers = {"--parallel": at.args.parallel, "--threads": at.args.threads}
        options = [text for name, value in numbers.items() if value for text in (name, str(value))]
        try:
            at.call("launch", folder, "--local", *options)
        except Stopped as stopped:
            if stopped.args[0] == INTERRUPTED:
                raise
    found = collect([at.folder / LADDER], at.args.loss)
    if found.left_out and not at.args.skip_failed:
        names = "; ".join(f"{name} {state}: {why}" for name, state, why in found.left_out[:3])
        raise UserError(
            f"{counted(len(found.left_out), 'run of the ladder is', 'runs of the ladder are')} not done "
            f"({names}): see {folder}/logs, then run this command "
            "again, or add --skip-failed to continue without them"
        )
    return {"runs": len(found.rows), "left_out": len(found.left_out)}


def _run_on_slurm(at: Context) -> None:
    """Submit the runs that have not ended and are not in the queue. Raises Stopped while any run is in the queue."""
    from qwen_moe.launch.folder import open_folder
    from qwen_moe.runs.outcome import read_outcome
    from qwen_moe.workflow.cost import in_queue

    entries = open_folder(at.folder / LADDER, [])
    queued = in_queue(entries)  # before the outcomes, so that a run that ends in between is not submitted again
    left = {
        entry.name
        for entry in entries
        if read_outcome(entry.config, entry.config.run_dir).state in ("missing", "unfinished")
    }
    if left - queued:
        options = {"--time": at.args.time, "--max-parallel": at.args.parallel}
        given = [text for name, value in options.items() if value for text in (name, str(value))]
        at.call("launch", at.path(LADDER), "--array", *given, *_site(at), captured=False)
    if left:
        print(
            f"{len(left)} of {counted(len(entries), 'small run is', 'small runs are')} in the queue: `qwen-moe "
            f"status {at.path(LADDER)}/runs` shows them; give the same command again when they have ended",
            file=sys.stderr,
        )
        raise Stopped(0)


def _collect_inputs(at: Context) -> dict[str, Any]:
    # The runs do not change after `run` is done. If `run` was done again, so is this step.
    return {"--loss": at.args.loss, "when the runs ended": at.state.steps.get("run", {}).get("finished")}


def _collect(at: Context) -> dict[str, Any]:
    output = at.call("scaling", "collect", at.path(LADDER), "--output", at.path(RUNS), "--loss", at.args.loss, "--json")
    return json.loads(output)


def _fit_inputs(at: Context) -> dict[str, Any]:
    return {f"{at.path(RUNS)} (content)": content(at.folder / RUNS)}


def _fit(at: Context) -> dict[str, Any]:
    fit = json.loads(at.call("scaling", "fit", at.path(RUNS), "--output", at.path(FIT), "--json"))
    pictures = at.call("scaling", "report", at.path(FIT)).split()
    kept = ("runs", "groups", "sizes", "ranges", "warnings", "validation", "loss_law")
    return {key: fit[key] for key in kept} | {"pictures": [Path(p).name for p in pictures if p.endswith(".png")]}


def _recommend_inputs(at: Context) -> dict[str, Any]:
    target = _ladder_inputs(at)
    return {
        f"{at.path(FIT)} (content)": content(at.folder / FIT / "fit.json"),
        "--accept-extrapolation": at.args.accept_extrapolation,
        **({"--gpus divide": divisor} if (divisor := _divisor(at.args.gpus)) > 1 else {}),
        **{key: value for key, value in target.items() if key != "--flops-budget"},
    }


def round_batch(sequences: int, divisor: int = 1) -> int:
    """Round to a multiple of the largest power of two that changes the batch by at most 6%, so that many layouts divide it;
    by at most 25%, if only that makes it a multiple of ``divisor``, a power of two. The loss is flat there: on the public
    sweeps, changes of 6 and 25% cost less than 0.01 and 0.05% of it."""

    def rounded(most: float) -> tuple[int, int]:
        power = 1
        while (
            round(sequences / (2 * power)) and abs(round(sequences / (2 * power)) * 2 * power / sequences - 1) <= most
        ):
            power *= 2
        return round(sequences / power) * power, power

    batch, power = rounded(0.06)
    if power < divisor:
        multiple = round(sequences / divisor) * divisor
        return multiple if multiple and abs(multiple / sequences - 1) <= 0.25 else rounded(0.25)[0]
    return batch


def _divisor(gpus: int | None) -> int:
    """What the batch should be a multiple of, so that layouts on so many GPUs exist: their power of two, at most 8."""
    return math.gcd(gpus, MOST_DIVISOR) if gpus else 1


def _recommend(at: Context) -> dict[str, Any]:
    from qwen_moe.models.flops import count_parameters

    config, size = at.config, count_parameters(at.config.model)
    target = {
        "--n-total": size.non_vocabulary_total,
        "--n-active": size.non_vocabulary_activated,
        "--tokens": config.training.train_tokens,
        "--seq-len": config.data.sequence_length,
    }
    accept = ["--accept-extrapolation"] if at.args.accept_extrapolation else []
    options = [text for name, value in target.items() for text in (name, str(value))]
    found = json.loads(at.call("scaling", "recommend", at.path(FIT), *options, *accept, "--json"))
    batch = round_batch(found["batch_size_sequences"], _divisor(at.args.gpus))
    rate = float(f"{found['learning_rate']:.3g}")
    training = config.training
    micro = max(m for m in range(1, training.micro_batch_size + 1) if batch % m == 0)
    changes = {
        "training": training.model_copy(update={"global_batch_size": batch, "micro_batch_size": micro}),
        "optimizer": config.optimizer.model_copy(update={"learning_rate": rate}),
        "schedule": config.schedule.model_copy(
            update={"min_learning_rate": config.schedule.min_learning_rate * rate / config.optimizer.learning_rate}
        ),
    }
    write_text(at.folder / RECOMMENDED, dump_config(config.model_copy(update=changes)))
    before = {
        "learning_rate": config.optimizer.learning_rate,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
    }
    return found | {
        "written": {"learning_rate": rate, "global_batch_size": batch, "micro_batch_size": micro},
        "before": before,
    }


def _plan_inputs(at: Context) -> dict[str, Any]:
    return {
        f"{at.path(RECOMMENDED)} (content)": content(at.folder / RECOMMENDED),
        "--gpus": at.args.gpus,
        "--gpu": at.args.gpu,
        "--gpus-per-node": at.args.gpus_per_node,
        **({"--network": at.args.network} if at.args.network else {}),
    }


def _plan(at: Context) -> dict[str, Any]:
    """Write the recipe, with a layout if GPUs are given and otherwise as recommended."""
    write_text(at.folder / RECIPE, (at.folder / RECOMMENDED).read_text(encoding="utf-8"))
    if not at.args.gpus:
        return {"skipped": "--gpus was not given, so the recipe keeps its own layout"}
    options = ["--gpus", str(at.args.gpus), "--gpu", at.args.gpu, "--gpus-per-node", str(at.args.gpus_per_node)]
    options += ["--network", at.args.network] if at.args.network else []
    options += ["--precision", planned_precision(at.config)]
    return {"text": at.call("plan", at.path(RECIPE), *options, "--write")}


def _launch_inputs(at: Context) -> dict[str, Any]:
    return {
        f"{at.path(RECIPE)} (content)": content(at.folder / RECIPE),
        "--gpus": at.args.gpus,
        "--gpus-per-node": at.args.gpus_per_node,
        "--time": at.args.time,
        "--submit": at.args.submit,
        "--site": str(at.args.site or ""),
    }


def _site(at: Context) -> list[str]:
    return ["--site", str(at.args.site)] if at.args.site else []


def launch_arguments(at: Context) -> list[str]:
    """Arguments that launch the final recipe, without --dry-run."""
    per_node = min(at.args.gpus_per_node, at.args.gpus)
    time = ["--time", at.args.time] if at.args.time else []
    nodes = ["--nodes", str(at.args.gpus // per_node), "--gpus-per-node", str(per_node)]
    return ["launch", at.path(RECIPE), *nodes, *time, *_site(at)]


def dry_run(at: Context) -> tuple[str, list[str]]:
    """(the script, the lines in which launch states the cost)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        script = at.call(*launch_arguments(at), "--dry-run")
    return script, [line for line in said.getvalue().splitlines() if line != NOTHING_DONE]


def _job_in_queue(at: Context) -> str:
    """The job of the final recipe, if it is in the queue or running already: an earlier call was stopped after it had
    submitted it. "" if there is none, or if it was submitted with another recipe."""
    from launchers.folder.run_folder import RunFolder
    from launchers.slurm import commands
    from qwen_moe.config import load_config
    from qwen_moe.launch.array import queued_runs
    from qwen_moe.launch.prepare import absolute

    config = absolute(load_config(at.folder / RECIPE))
    run = RunFolder(config.run_dir)
    job = queued_runs([run], {job.job_id: job for job in commands.queue()}).get(run.run_dir.resolve(), "")
    return job if job and load_config(run.launch / "recipe.yaml") == config else ""


def _launch_cost(at: Context) -> list[str]:
    return [] if _job_in_queue(at) else dry_run(at)[1]


def _launch(at: Context) -> dict[str, Any]:
    if not at.args.gpus:
        return {"skipped": f"--gpus was not given; train on this machine with: qwen-moe train {at.path(RECIPE)}"}
    if at.args.submit and (job := _job_in_queue(at)):
        return {"text": f"job {job} was in the queue already", "submitted": True}
    if at.args.submit:
        return {"text": at.call(*launch_arguments(at)), "submitted": True}
    script, said = dry_run(at)
    write_text(at.folder / SCRIPT, script)
    return {"text": "\n".join(said), "submitted": False}


STEPS = (
    Step(name="prepare", what="tokenize the corpus", inputs=_prepare_inputs, do=_prepare),
    Step(name="ladder", what="choose the small runs", inputs=_ladder_inputs, do=_ladder, keeps=True),
    Step(name="run", what="train the small runs", inputs=_run_inputs, do=_run, cost=_run_cost),
    Step(name="collect", what="make the table of runs", inputs=_collect_inputs, do=_collect),
    Step(name="fit", what="fit the laws", inputs=_fit_inputs, do=_fit),
    Step(name="recommend", what="learning rate and batch", inputs=_recommend_inputs, do=_recommend),
    Step(name="plan", what="the parallel layout", inputs=_plan_inputs, do=_plan),
    Step(name="launch", what="the job of the large run", inputs=_launch_inputs, do=_launch, cost=_launch_cost),
)
NAMES = tuple(step.name for step in STEPS)
