"""`post-training.md`: one page that shows what every step of `qwen-moe post-train` did, and what it gained."""

import sys
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.duration import span
from launchers.folder.atomic import write_text
from qwen_moe.packages import missing_text
from qwen_moe.posttraining.figures import rewards_by_step
from qwen_moe.posttraining.steps import MEASURE, Context, steps_of

PAGE, PICTURE = "post-training.md", "post-training.png"
TITLES = {
    "start": "to start from",
    "sft": "fine-tuned",
    "rollout": "sampled",
    "pairs": "paired",
    "dpo": "DPO",
    "reward_model": "reward model",
    "grpo": "GRPO",
}


def facts_of(at: Context) -> dict[str, Any]:
    """What the page shows, for programs."""
    steps = []
    for step in steps_of(at.walk):
        record = at.state.steps.get(step.name)
        done = record is not None
        steps.append(
            {"step": step.name, "done": done}
            | ({"seconds": record["seconds"], "commands": record["commands"], **record["facts"]} if record else {})
        )
    folder = at.walk.run_dir
    picture = folder / PICTURE
    return {
        "run_dir": str(folder),
        "page": str(folder / PAGE),
        "picture": str(picture) if picture.exists() else None,
        "steps": steps,
    }


def write_page(at: Context) -> Path:
    """Write the page and its picture from the recorded state, atomically. Returns the page's path."""
    folder = at.walk.run_dir
    lines = [f"# Post-training of {at.walk.source}", "", *_measured(at), *_table(at)]
    if _draw(at):
        lines += ["", f"![Held-out score after each step, and the reward of GRPO's samples]({PICTURE})"]
    lines += [*_samples(at), "", "## Commands", ""]
    lines += ["What was run. Each can be repeated by hand, and a recipe changed and trained alone.", ""]
    for step in steps_of(at.walk):
        lines += [f"    {command}" for command in at.state.steps.get(step.name, {}).get("commands", [])]
    write_text(folder / PAGE, "\n".join(lines) + "\n")
    return folder / PAGE


def _measured(at: Context) -> list[str]:
    section = at.walk.config.measure
    if section is None:
        return ["No model was measured: the recipe has no section `measure`.", ""]
    return [
        f"Score: the mean reward ({', '.join(section.rewards)}) of greedy answers to the held-out queries "
        f"{section.queries}. ± is one standard error; that of a gain is of the differences query by query.",
        "",
    ]


def _table(at: Context) -> list[str]:
    lines = [
        "| step | begins from | learned from | took | first → last | held-out before → after | gain, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in at.walk.config.steps:
        record = at.state.steps.get(name)
        before = at.walk.begins_from(name) if name != "pairs" else None
        begins = "" if name == "pairs" else "initial values" if before is None else TITLES.get(before, before)
        if before == "start":
            begins = str(at.walk.config.start)
        if record is None:
            lines.append(f"| {TITLES[name]} | {begins} | not done yet | | | | |")
            continue
        facts = record["facts"]
        score, gain = _scores(at, name)
        took = span(record["seconds"]) + (f", attempt {facts['attempts']}" if facts.get("attempts", 1) > 1 else "")
        lines.append(
            f"| {TITLES[name]} | {begins} | {_learned(name, facts)} | {took} | {_course(facts)} | {score} | {gain} |"
        )
    notes = [
        f"* {TITLES[name]}: {found}" for name in at.walk.config.steps if (found := at.state.facts(name).get("warning"))
    ]
    return [
        *lines,
        "",
        "First → last: of the first step, and the mean of the last tenth of the steps (at least five, at most half).",
        *notes,
    ]


def _learned(name: str, facts: dict[str, Any]) -> str:
    if name == "rollout":
        return (
            f"{counted(facts['queries'], 'query')}, {counted(facts['samples'], 'answer')}, mean reward "
            f"{facts['mean_reward']:.3f}, "
            f"{1 - facts['groups_without_variance']:.0%} of queries with different rewards"
        )
    if name == "pairs":
        counts = facts["counts"]
        return f"{counted(counts['pairs'], 'pair')} of {counted(counts['queries'], 'query')}"
    return str(facts["learned_from"])


def _course(facts: dict[str, Any]) -> str:
    """First and last values of what a run measured of itself."""
    found = []
    if "reward" in facts:  # a policy's loss says nothing of how good it is
        found.append(f"reward {facts['reward'][0]:.3f} → {facts['reward'][1]:.3f}")
    elif "loss" in facts:
        found.append(f"loss {facts['loss'][0]:.3f} → {facts['loss'][1]:.3f}")
    if "accuracy" in facts:
        found.append(f"pairs in order {facts['accuracy'][0]:.0%} → {facts['accuracy'][1]:.0%}")
    return ", ".join(found)


def _scores(at: Context, name: str) -> tuple[str, str]:
    """Held-out scores before and after a step, and its gain, as text."""
    facts = at.state.facts(f"{MEASURE}{name}")
    if not facts:
        return "", ""
    after = f"**{facts['score']:.1%}** ± {facts['error']:.1%}"
    if "before" not in facts:
        return after, ""
    before = at.state.facts(f"{MEASURE}{facts['before']}")
    return f"{before['score']:.1%} → {after}", f"{100 * facts['gain']:+.1f} ± {100 * facts['gain_error']:.1f}"


def _samples(at: Context) -> list[str]:
    """Answers of every model to the first held-out queries."""
    models = [name for name in at.walk.config.measured if at.state.facts(f"{MEASURE}{name}").get("samples")]
    if not models:
        return []
    answers = [at.state.facts(f"{MEASURE}{name}")["samples"] for name in models]
    lines = ["", "## The first held-out queries", ""]
    lines += [f"| query | expected | {' | '.join(TITLES[name] for name in models)} |", "|---" * (2 + len(models)) + "|"]
    for row in zip(*answers, strict=False):
        cells = [f"{_cell(one['answer'])} ({one['reward']:g})" for one in row]
        expected = row[0]["expected"]
        lines.append(
            f"| {_cell(row[0]['query'])} | {'' if expected is None else _cell(expected)} | {' | '.join(cells)} |"
        )
    return [*lines, "", "In brackets: the reward."]


def _cell(value: Any) -> str:
    """Text in a cell of a table."""
    text = " ".join(str(value).split())
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;") or "(nothing)"


def _draw(at: Context) -> bool:
    """Draw the picture if it can be drawn; the walk does not depend on it."""
    models = [name for name in at.walk.config.measured if at.state.facts(f"{MEASURE}{name}")]
    if not models:
        return False
    if missing := missing_text("matplotlib"):
        print(f"no picture: {missing}; then the same command draws it", file=sys.stderr)
        return False
    from qwen_moe.posttraining.picture import draw

    facts = [at.state.facts(f"{MEASURE}{name}") for name in models]
    scores = [(TITLES[name], one["score"], one["error"]) for name, one in zip(models, facts, strict=True)]
    rewards = rewards_by_step(at.walk.folder("grpo")) if at.state.facts("grpo") else ([], [])
    try:
        draw(scores, rewards, at.walk.run_dir / PICTURE)
    except Exception as error:  # a full disk, or a broken matplotlib
        print(f"no picture: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True
