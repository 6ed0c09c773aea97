"""What every step decided about one document."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launchers.counted import counted
from launchers.folder.run_folder import read_json
from qwen_moe.curation.dedup import CLUSTERS
from qwen_moe.curation.documents import DROPPED, KEPT
from qwen_moe.curation.recipe import NUMBERS, CurateConfig
from qwen_moe.curation.synthesise import REJECTED, TEXTS
from qwen_moe.errors import UserError
from qwen_moe.workflow.state import State

_LONGEST = 600  # characters of metadata
_NEAR = 2000  # ids among which similar ones are looked for


def explain(config: CurateConfig, state: State, identity: str) -> str:
    """The steps in order, and what each decided about the document. Raises UserError if no step has seen it."""
    identity, _, copy = identity.partition("#") if identity.rsplit("#", 1)[-1].isdigit() else (identity, "", "")
    lines = [identity if not copy else f"{identity} (its copy {copy} has the same text)"]
    found = False
    for name in config.steps:
        if name not in state.steps or name == "prepare":
            continue
        folder = config.run_dir / f"{NUMBERS[name]}-{name}"
        verdict = _verdict(name, folder, identity)
        if verdict is None:
            continue
        found = True
        lines.append(f"{name + ':':18s}{verdict}")
        if verdict.startswith("dropped"):
            break
    if not found:
        raise UserError(_unknown(config, identity))
    return "\n".join(lines)


def rows_with(files: Iterator[Path], identity: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The rows of a document. Lines are parsed only if they have the text of its id in them."""
    wanted = json.dumps(identity, ensure_ascii=False).encode()
    for path in files:
        with path.open("rb") as file:
            for line in file:
                if wanted in line and (row := json.loads(line))["id"] == identity:
                    yield path, row


def _verdict(name: str, folder: Path, identity: str) -> str | None:
    """What a step decided, in words; None if it has not seen the document."""
    if name == "synthesise":
        files = (folder / one for one in (TEXTS, REJECTED))
    else:
        files = (path for part in (KEPT, DROPPED) for path in sorted((folder / part).rglob("*.jsonl")))
    for path, row in rows_with(files, identity):
        metadata = row["metadata"]
        if path.name == REJECTED or DROPPED in path.relative_to(folder).parts:
            return (
                f"dropped by {metadata['filter']}: {metadata['filter_reason']}{_more(name, folder, metadata, identity)}"
            )
        return f"kept{_kept(name, folder, row)}"
    return None


def _more(name: str, folder: Path, metadata: dict[str, Any], identity: str) -> str:
    """What there is to say about a dropped document."""
    if name == "deduplication":
        for cluster in _clusters(folder):
            if identity in cluster["dropped"]:
                return f"; kept of its {counted(len(cluster['dropped']) + 1, 'document')}: {cluster['kept']}"
    if name == "weights":
        share = _share(folder, str(metadata.get("domain")))
        return f"; of domain {metadata.get('domain')}, {share['repeats']:.1%} is kept" if share else ""
    if name == "scores":
        return f" ({_scores(metadata)})"
    if name == "decontamination":
        leak = metadata["leak"]
        found = f"{leak['common']} of {leak['shorter']} tokens in common"
        return f"; {found} with {leak['test_file']}, line {leak['test_line']}: {_shortened(leak['matched'])}"
    known = {"filter", "filter_reason", "file_path", "line", "domain", "edited", "given_id"}
    others = {key: value for key, value in metadata.items() if key not in known}
    return f" ({_shortened(json.dumps(others, ensure_ascii=False))})" if others and name == "filters" else ""


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _kept(name: str, folder: Path, row: dict[str, Any]) -> str:
    metadata = row["metadata"]
    if name == "read":
        return f", {counted(len(row['text']), 'character')}, domain {metadata.get('domain')}"
    if name == "filters":
        edits = [
            f"{by} left {after:,} of {before:,} characters"
            for by, (before, after) in metadata.get("edited", {}).items()
        ]
        language = f"language {metadata['language']} ({metadata['language_score']})" if "language" in metadata else ""
        return ", ".join(["", *edits, *([language] if language else [])])
    if name == "scores":
        return f", {_scores(metadata)}"
    if name == "domains":
        return f", domain {metadata.get('domain')}"
    if name == "deduplication":
        own = [cluster for cluster in _clusters(folder) if cluster["kept"] == row["id"]]
        return "".join(f", instead of {', '.join(one['dropped'])} ({one['kind']})" for one in own)
    if name == "weights":
        share = _share(folder, str(metadata.get("domain")))
        return f", domain {metadata.get('domain')} is there {share['repeats']:.2f} times" if share else ""
    return ""


def _scores(metadata: dict[str, Any]) -> str:
    scores = metadata.get("scores") or {}
    return "scores " + (", ".join(f"{name} {value:.3g}" for name, value in scores.items()) or "none")


def _clusters(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / CLUSTERS).open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def _share(folder: Path, domain: str) -> dict[str, Any] | None:
    return ((read_json(folder / "plan.json") or {}).get("domains") or {}).get(domain)


def _unknown(config: CurateConfig, identity: str) -> str:
    """The message for an id that no step has, with similar ones that are there."""
    ids: list[str] = []
    for path in sorted((config.run_dir / f"{NUMBERS['read']}-read" / KEPT).glob("*.jsonl")):
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                one = json.loads(line)["id"]
                if identity.rsplit("/", 1)[-1] in one or len(ids) < 3:
                    ids.append(one)
                if len(ids) > _NEAR:
                    break
    near = difflib.get_close_matches(identity, ids, n=3, cutoff=0) or ids[:3]
    such = (
        f"; there are ids such as {', '.join(near)}"
        if near
        else ": it has read none. Run the same command without --why first"
    )
    return f"--why {identity}: no step of {config.run_dir} has a document of this id{such}"
