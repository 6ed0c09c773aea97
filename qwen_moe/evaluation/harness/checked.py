"""Whether the data that a run was trained on were checked against the texts that it is tested on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from qwen_moe.config import load_config
from qwen_moe.data.checked import share_checked
from qwen_moe.errors import UserError
from qwen_moe.runs.records import RESOLVED


def prefixes_of(run: Path) -> list[Path]:
    """The data that a run was trained on; empty if its recipe is not there."""
    if not (run / RESOLVED).is_file():
        return []
    try:
        data = load_config(run / RESOLVED).data
    except UserError:
        return []
    prepared = [data.prepare.output] if data.prepare is not None else []
    return [Path(prefix) for prefix in dict.fromkeys([*(one.prefix for one in data.train), *prepared])]


def share_of_texts(prefixes: Sequence[Path], texts: Iterable[str]) -> float | None:
    """The share of ``texts`` that every one of ``prefixes`` was checked against when leaks were removed; None if there are
    no prefixes. Raises UserError for damaged records."""
    if not prefixes:
        return None
    texts = list(texts)
    return min(share_checked(prefix, texts) for prefix in prefixes) if texts else None


def warning(task: str, share: float | None) -> str:
    """What to tell the user; empty if there is nothing to tell."""
    if share is None or share >= 1:
        return ""
    part = f"{share:.0%} of" if share > 0 else "none of"
    return (
        f"the run's data were checked against {part} the texts of {task}: if they hold test texts, the score is too high. "
        "`evaluate tasks --export-tests DIR` and `data decontaminate --against DIR/*.jsonl` check them"
    )
