"""`curate.md`, `curate.png` and `curate.json`: what every step kept and dropped, and why."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted
from launchers.duration import span
from launchers.folder.atomic import write_json, write_text
from qwen_moe.curation.documents import KEPT
from qwen_moe.packages import missing_text

if TYPE_CHECKING:
    from qwen_moe.curation.step import Context

PAGE, PICTURE, FACTS = "curate.md", "curate.png", "curate.json"


def kept_by_domain(facts: dict[str, Any], what: str = "documents") -> dict[str, int]:
    return dict(facts.get("tally", {}).get(KEPT, {}).get(what, {}))


def dropped_by_reason(facts: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Filter -> reason -> documents."""
    return {name: dict(one["reasons"]) for name, one in facts.get("tally", {}).items() if name != KEPT}


def facts_of(at: "Context") -> dict[str, Any]:
    """What the page shows, for programs."""
    steps = []
    for name in at.config.steps:
        record = at.state.steps.get(name)
        if record is None:
            steps.append({"step": name, "done": False})
            continue
        facts = record["facts"]
        found: dict[str, Any] = {"step": name, "done": True, "seconds": record["seconds"]}
        if "tally" in facts:
            kept = kept_by_domain(facts)
            found |= {
                "documents": sum(kept.values()),
                "characters": sum(kept_by_domain(facts, "characters").values()),
                "by_domain": kept,
                "dropped": dropped_by_reason(facts),
                "edited": facts["tally"].get(KEPT, {}).get("edited", {}),
                "scores": facts["tally"].get(KEPT, {}).get("scores", {}),
            }
        steps.append(found | {key: value for key, value in facts.items() if key != "tally"})
    folder = at.config.run_dir
    picture = folder / PICTURE
    return {
        "run_dir": str(folder),
        "page": str(folder / PAGE),
        "picture": str(picture) if picture.exists() else None,
        "steps": steps,
    }


def line_of(at: "Context", step: str) -> str:
    """What a step did, in one line."""
    facts = at.state.facts(step)
    if "tally" not in facts:
        if step == "synthesise":
            return f"{counted(facts['kept'], 'answer')} kept, {facts['rejected']:,} rejected"
        return ", ".join(f"{name} {counted(one['tokens'], 'token')}" for name, one in facts.get("prefixes", {}).items())
    kept = sum(kept_by_domain(facts).values())
    dropped = sum(sum(reasons.values()) for reasons in dropped_by_reason(facts).values())
    if step == "weights":
        tokens = sum(share["tokens_after"] for share in facts["domains"].values())
        return f"{_count(kept)} of {tokens:,} tokens, {dropped:,} left out"
    bad = facts.get("bad", {}).get("count", 0)
    return f"{_count(kept)} kept, {dropped:,} dropped" + (f", {bad:,} could not be read" if bad else "")


def _count(documents: int) -> str:
    return f"{documents:,} document{'' if documents == 1 else 's'}"


def write_page(at: "Context") -> Path:
    """Write the page, its picture and its figures from the recorded state, atomically. Returns the page's path."""
    folder = at.config.run_dir
    drawn = _draw(at)
    facts = facts_of(at)
    write_json(folder / FACTS, facts)
    lines = [f"# Curation of {at.source}", ""]
    if drawn:
        lines += [f"![Documents after each step, domains before and after, scores]({PICTURE})", ""]
    lines += [*_steps(facts), *_domains(at), *_reasons(facts), *_blend(at)]
    lines += ["", f"What became of a document: `qwen-moe data curate {at.source} --why ID`."]
    write_text(folder / PAGE, "\n".join(lines) + "\n")
    return folder / PAGE


def _steps(facts: dict[str, Any]) -> list[str]:
    lines = [
        "## Steps",
        "",
        "| step | documents left | characters left | dropped | took |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in facts["steps"]:
        if not one["done"]:
            lines.append(f"| {one['step']} | not done yet | | | |")
        elif "documents" in one:
            dropped = sum(sum(reasons.values()) for reasons in one["dropped"].values())
            lines.append(
                f"| {one['step']} | {one['documents']:,} | {one['characters']:,} | {dropped:,} | {span(one['seconds'])} |"
            )
        else:
            lines.append(f"| {one['step']} | | | | {span(one['seconds'])} |")
    return [*lines, ""]


def _domains(at: "Context") -> list[str]:
    """What the weights did to each domain."""
    shares = at.state.facts("weights").get("domains")
    if not shares:
        return []
    before = sum(share["tokens"] for share in shares.values())
    after = sum(share["tokens_after"] for share in shares.values())
    read = kept_by_domain(at.state.facts("read"))
    lines = [
        "## Domains",
        "",
        "| domain | read | documents before | tokens | share | target | repeats | documents after | tokens | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, share in shares.items():
        target = "" if share["target"] is None else f"{share['target']:.1%}"
        lines.append(
            f"| {name} | {read.get(name, 0):,} | {share['documents']:,} | {share['tokens']:,} "
            f"| {share['tokens'] / before:.1%} | {target} | {share['repeats']:.2f} "
            f"| {share['documents_after']:,} | {share['tokens_after']:,} | {share['tokens_after'] / after:.1%} |"
        )
    return [*lines, "", f"All: {before:,} tokens before, {after:,} after.", ""]


def _reasons(facts: dict[str, Any]) -> list[str]:
    lines = ["## Dropped", "", "| step | filter | reason | documents |", "|---|---|---|---:|"]
    for one in facts["steps"]:
        for name, reasons in one.get("dropped", {}).items():
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
                lines.append(f"| {one['step']} | {name} | {reason.replace('|', '/')} | {count:,} |")
        for name, count in one.get("edited", {}).items() if one["step"] == "filters" else ():
            lines.append(f"| {one['step']} | {name} | (text edited, kept) | {count:,} |")
        bad = one.get("bad", {})
        if bad.get("count"):
            lines.append(f"| {one['step']} | | cannot be read | {bad['count']:,} |")
        if bad.get("empty"):
            lines.append(f"| {one['step']} | | without text | {bad['empty']:,} |")
    return [*lines, ""]


def _blend(at: "Context") -> list[str]:
    blend = at.state.facts("prepare").get("blend")
    if not blend:
        return []
    text = Path(blend).read_text(encoding="utf-8").splitlines()
    return ["## Blend", "", f"For a training recipe ({blend}):", "", "```yaml", *text, "```"]


def _draw(at: "Context") -> bool:
    """Draw the picture if it can be drawn; the curation does not depend on it."""
    if "read" not in at.state.steps:
        return False
    if missing := missing_text("matplotlib"):
        print(f"no picture: {missing}; then the same command draws it", file=sys.stderr)
        return False
    from qwen_moe.curation.picture import draw

    left = [(name, kept_by_domain(at.state.facts(name))) for name in at.config.steps if "tally" in at.state.facts(name)]
    scores = at.state.facts("scores").get("tally", {})
    together: dict[str, dict[str, int]] = {}
    for one in scores.values():
        for dimension, counts in one.get("scores", {}).items():
            total = together.setdefault(dimension, {})
            for value, count in counts.items():
                total[value] = total.get(value, 0) + count
    try:
        draw(left, at.state.facts("weights").get("domains") or {}, together, at.config.run_dir / PICTURE)
    except Exception as error:  # a full disk, or a broken matplotlib
        print(f"no picture: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True
