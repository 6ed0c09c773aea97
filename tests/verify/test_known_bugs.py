"""Bugs that public projects shipped in their context parallelism would be seen here (`tests.verify.known_bugs`)."""

import functools
import traceback
from typing import Any

import pytest

from parallel.local_group import RankFailed
from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.verify.compare import compare
from tests.distributed import run_distributed
from tests.verify import known_bugs
from tests.verify.context_cases import DOCUMENTS, context_case, reference_on, train_on
from tests.verify.known_bugs import Break

BALANCED = {"balance__scope": "sequence", "training__global_batch_size": 6}

# Which layout, kind, batches and changes show the bugs of a table.
GROUPS: dict[str, tuple[dict[str, Break], Layout, str, str, dict[str, Any]]] = {
    "ring": (known_bugs.RING, Layout(cp=2, ep=2), "ring", "both", DOCUMENTS | BALANCED),
    "all_gather": (
        known_bugs.WITHOUT_DOCUMENTS, Layout(cp=2, tp=2), "all_gather", "labels", {"balance__capacity_factor": 0.5},
    ),
    "alone": (known_bugs.ALONE, Layout(cp=2), "all_gather", "", {}),
    "over tp": (known_bugs.OVER_TP, Layout(cp=2, tp=2), "ring", "", {}),
    "heads": (known_bugs.HEADS, Layout(cp=4), "ulysses", "", {}),
}  # fmt: skip
BUGS = {bug: group for group, (table, *_) in GROUPS.items() for bug in table}
UNBROKEN = "unbroken"
LONG = ("ring", "all_gather")  # many bugs, all of them in the first test of the group


def _marked(groups: dict[str, str]) -> list[Any]:
    """Names, of which those with a long group are slow tests. ``groups`` maps names to groups."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (group in LONG)) for name, group in groups.items()]


def _each(config: RunConfig, batches: str, group: str) -> dict[str, Any]:
    """A report of one step for each bug of ``group``, and for none; or the error that it ends with, on every rank."""
    reports: dict[str, Any] = {}
    for bug, mutate in {UNBROKEN: lambda patch: None, **GROUPS[group][0]}.items():
        undo: list[tuple[Any, str, Any]] = []

        def patch(where: Any, name: str, value: Any, undo: list[tuple[Any, str, Any]] = undo) -> None:
            undo.append((where, name, vars(where)[name]))
            setattr(where, name, value)

        mutate(patch)
        try:
            reports[bug] = train_on(config, batches, 1, False)
        except Exception:
            reports[bug] = traceback.format_exc()
        for where, name, value in reversed(undo):
            setattr(where, name, value)
    return reports


@functools.cache
def _found(group: str) -> dict[str, Any]:
    """For each bug, the differences from one process, or the error."""
    _, layout, kind, batches, changes = GROUPS[group]
    config = context_case(layout, kind, **changes)
    by_rank = run_distributed(_each, layout.world_size, config, batches, group)
    expected = reference_on(config, layout, batches, 1)
    found = {}
    for bug in by_rank[0]:
        reports = [reports[bug] for reports in by_rank]
        errors = [report for report in reports if isinstance(report, str)]
        found[bug] = errors[0] if errors else compare(reports, expected)
    return found


@pytest.mark.parametrize("group", _marked({group: group for group in GROUPS}))
def test_without_a_bug_all_are_equal(group: str) -> None:
    found = _found(group)[UNBROKEN]
    assert not isinstance(found, str) and found.equal, found


@pytest.mark.parametrize("bug", _marked(BUGS))
def test_a_known_bug_is_seen(bug: str) -> None:
    found = _found(BUGS[bug])[bug]
    if not isinstance(found, str):
        assert not found.equal and (found.wrong or found.largest > 1e-6), found


def _pipeline_of_whole_sequences(config: RunConfig) -> Any:
    known_bugs.hidden_states_of_whole_sequences(setattr)
    return train_on(config, "", 1, False)


def test_megatron_571_is_seen() -> None:
    """The pipeline's messages sized for the whole sequence: refused before anything is sent."""
    with pytest.raises(RankFailed, match="shape"):
        run_distributed(_pipeline_of_whole_sequences, 4, context_case(Layout(cp=2, pp=2), "ring"))
