"""Records of a launched run that are damaged: each is named, or counts as not written yet; none is half believed."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.local import LaunchError
from launchers.run_folder import RunFolder
from launchers.status import last_metrics, row

FACTS = {"launched": 1.0, "train_steps": 10, "tokens_per_step": 32, "local": True, "job": ""}
DECISION = {"action": "stop", "kind": "crash", "reason": "rank 0 died", "started": 2.0}


def write_run(folder: Path, facts: Any = FACTS, decision: Any = DECISION) -> RunFolder:
    attempt = folder / "launch" / "attempts" / "001"
    attempt.mkdir(parents=True)
    (folder / "launch" / "launch.json").write_text(json.dumps(facts))
    (attempt / "decision.json").write_text(json.dumps(decision))
    return RunFolder(folder)


def test_whole_records_are_believed(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert run.facts() == FACTS and run.attempts()[0].decision() == DECISION
    assert row(tmp_path, None)["last"] == "rank 0 died"


@pytest.mark.parametrize("key", ["launched", "train_steps", "tokens_per_step"])
@pytest.mark.parametrize("value", [None, "ten", [], True, float("nan"), float("inf"), 10**400])
def test_a_damaged_fact_is_named(tmp_path: Path, key: str, value: Any) -> None:
    run = write_run(tmp_path, facts=FACTS | {key: value})
    with pytest.raises(LaunchError, match=f"launch.json is damaged: its {key} is"):
        run.facts()


@pytest.mark.parametrize("key", DECISION)
@pytest.mark.parametrize("value", [None, [], {}])
def test_a_damaged_decision_counts_as_none(tmp_path: Path, key: str, value: Any) -> None:
    write_run(tmp_path, decision=DECISION | {key: value})
    assert row(tmp_path, None)["state"] == "interrupted"


@pytest.mark.parametrize("content", ["5", "[]", '["n1"]', "[" * 20_000])
def test_damaged_exclusions_exclude_nothing(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path)
    (run.launch / "excluded_nodes.json").write_text(content)
    assert run.excluded_nodes() == {}


@pytest.mark.parametrize("line", ["5", '{"step": 9, "loss": "low"}', '{"step": null, "loss": []}'])
def test_a_damaged_line_of_metrics_is_passed_over(tmp_path: Path, line: str) -> None:
    good = {"step": 8, "loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    assert last_metrics(tmp_path)[0] == good
