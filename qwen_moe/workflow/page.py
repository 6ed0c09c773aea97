"""`pipeline.md`: one page that shows what was decided and why, with pictures and the commands that repeat each step."""

import time
from collections.abc import Callable
from typing import Any

from launchers.counted import counted
from launchers.duration import span
from launchers.folder.atomic import write_text
from qwen_moe.scaling.ladder import far_text
from qwen_moe.workflow.steps import FIT, RECIPE, RUNS, SCRIPT, STEPS, TARGET, Context

PAGE = "pipeline.md"


def write_page(at: Context) -> None:
    """Write the page from the recorded state, atomically."""
    from qwen_moe.models.flops import count_parameters

    config, size = at.config, count_parameters(at.config.model)
    tokens = config.training.train_tokens
    flops = 6 * size.non_vocabulary_activated * tokens
    lines = [
        f"# Pipeline of {at.args.recipe}",
        "",
        f"The large run: {size.total:,} parameters ({size.activated:,} activated by a token; without vocabulary N = "
        f"{size.non_vocabulary_total:.4g}, {size.non_vocabulary_activated:.4g} activated), D = {tokens:.4g} tokens, "
        f"{flops:.3g} FLOPs (6 N_active D).",
        "",
        "| step | what | done | its last call took |",
        "|---|---|---|---|",
    ]
    for step in STEPS:
        record = at.state.steps.get(step.name)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["finished"])) if record else "not yet"
        lines.append(f"| {step.name} | {step.what} | {when} | {span(record['seconds']) if record else ''} |")
    for name, write in _SECTIONS.items():
        record = at.state.steps.get(name)
        if record is None:
            continue
        lines += ["", f"## {name.capitalize()}", "", *write(at, record["facts"])]
        lines += ["", *(f"    {command}" for command in record["commands"])]
    write_text(at.folder / PAGE, "\n".join(lines) + "\n")


def _prepare(at: Context, facts: dict[str, Any]) -> list[str]:
    return [
        f"* {data['prefix']}: {counted(data['documents'], 'document')}, {data['tokens']:,} tokens"
        for data in facts["data"]
    ]


def _ladder(at: Context, facts: dict[str, Any]) -> list[str]:
    deviation = facts["log_deviation"]
    lines = [
        f"{counted(facts['runs'], 'run')} in {counted(facts['groups'], 'group')}, {facts['flops']:.3g} FLOPs in all. "
        "The large run is expected to "
        "lose something because its best learning rate and batch size are not known exactly. Groups were chosen to reduce "
        f"this loss most per FLOP: from {facts['expected_excess_before']:.3%} of its loss with published laws alone to "
        f"{facts['expected_excess_after']:.3%} after these runs (learning rate known to a factor of "
        f"{2.71828 ** deviation['learning_rate']:.2f}, batch size to {2.71828 ** deviation['batch_size']:.2f}). This holds "
        "if the small runs surround their own best values; what they really tell is under Recommend.",
    ]
    if far := far_text(facts.get("too_far", ())):
        lines += ["", f"Note: {far}."]
    if facts["branches"]:
        lines += [
            "",
            f"{facts['branches']} of the runs branch off longer ones where their decay begins, and cost their decay alone.",
        ]
    lines += [
        "",
        "| N | activated | tokens | runs | FLOPs |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['n_total']:.3g} | {row['n_active']:.3g} | {row['tokens']:.3g} | {row['runs']} | {row['flops']:.2g} |"
        for row in sorted(facts["table"], key=lambda row: (row["n_total"], row["tokens"]))
    ]


def _run(at: Context, facts: dict[str, Any]) -> list[str]:
    left = f"; {facts['left_out']} failed and are left out" if facts["left_out"] else ""
    return [f"{counted(facts['runs'], 'small run has', 'small runs have')} ended{left}."]


def _collect(at: Context, facts: dict[str, Any]) -> list[str]:
    loss = (
        "validation loss after the last step"
        if at.args.loss == "validation"
        else "training loss of the last 2% of steps"
    )
    lines = [
        f"{counted(facts['runs'], 'run')} in the table, {facts['diverged']} of them diverged. Their loss is the {loss}."
    ]
    lines += [f"* left out: {one['run']}, {one['state']}: {one['why']}" for one in facts["left_out"]]
    return lines + [f"* {note}" for note in facts["notes"]]


def _fit(at: Context, facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{counted(facts['runs'], 'run')} in {counted(facts['groups'], 'group')} of equal size and duration, "
        f"{counted(facts['sizes'], 'size')}."
    ]
    law = facts["loss_law"]
    lines.append(f"Loss law: {law['form']}." if law else "No loss law: these runs do not determine one.")
    lines += ["The [report](fit/report.md) says how far to trust it.", ""]
    lines += [f"* {warning}" for warning in facts["warnings"]]
    return lines + ["", *(f"![{name}]({FIT}/{name})" for name in facts["pictures"])]


def _recommend(at: Context, facts: dict[str, Any]) -> list[str]:
    written, before, batch = facts["written"], facts["before"], facts["batch_size_tokens"]

    def interval(key: str, form: str, unit: float = 1) -> str:
        found = facts["intervals"][key]
        return f"{found[0] / unit:{form}} to {found[1] / unit:{form}}" if found else "too few groups to tell"

    loss = facts["predicted_loss"]
    lines = [
        "| | recipe | written | 95% |",
        "|---|---|---|---|",
        f"| learning rate | {before['learning_rate']:.3g} | {written['learning_rate']:.3g} | "
        f"{interval('learning_rate', '.2e')} |",
        f"| batch, sequences | {before['global_batch_size']:,} | {written['global_batch_size']:,} | "
        f"{interval('batch_size_tokens', ',.3g', batch / facts['batch_size_sequences'])} |",
        "",
        f"The laws' minimum at this size and duration is a batch of {batch:,} tokens "
        f"({counted(facts['batch_size_sequences'], 'sequence')}; written: {written['global_batch_size']:,}, so that many "
        f"layouts divide it). Expected cost of not knowing the minimum exactly: "
        f"{facts['predicted_excess_loss']:.3%} of the loss. Larger batches, up to "
        f"{facts['widest_batch_tokens']:,.0f} tokens, cost less than 0.1% more.",
    ]
    if loss is not None:
        lines += ["", f"Predicted loss {loss:.4f} (95%: {interval('predicted_loss', '.4f')})."]
    published = [
        f"* {name}: learning rate {other['learning_rate']:.3g}, batch {other['batch_size_tokens']:,.0f} tokens"
        for name, other in facts["published"].items()
    ]
    outside = {name: times for name, times in facts["extrapolation"].items() if times > 1.001}
    told = ", ".join(f"{name} {times:.3g} times" for name, times in outside.items())
    lines += ["", "What published laws say:", "", *published, "", f"Beyond the small runs: {told or 'nothing'}."]
    more = f"qwen-moe scaling next {at.path(TARGET)} --runs {at.path(RUNS)}"
    lines += ["", f"Whether further small runs would be worth their cost, and which: `{more}`.", ""]
    known = at.state.facts("fit").get("warnings", ())
    return lines + [f"* {warning}" for warning in facts["warnings"] if warning not in known]


def _text(at: Context, facts: dict[str, Any]) -> list[str]:
    if "skipped" in facts:
        return [f"Skipped: {facts['skipped']}."]
    return ["```", facts["text"].strip(), "```"]


def _plan(at: Context, facts: dict[str, Any]) -> list[str]:
    return [*_text(at, facts), "", f"The recipe to run: [{RECIPE}]({RECIPE})."]


def _launch(at: Context, facts: dict[str, Any]) -> list[str]:
    if "skipped" in facts:
        return _text(at, facts)
    how = (
        "Submitted."
        if facts["submitted"]
        else f"Not submitted: [{SCRIPT}]({SCRIPT}) is the script; --submit submits it."
    )
    return [how, "", *_text(at, facts)]


_SECTIONS: dict[str, Callable[[Context, dict[str, Any]], list[str]]] = {
    "prepare": _prepare,
    "ladder": _ladder,
    "run": _run,
    "collect": _collect,
    "fit": _fit,
    "recommend": _recommend,
    "plan": _plan,
    "launch": _launch,
}
