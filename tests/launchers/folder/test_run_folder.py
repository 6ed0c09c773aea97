"""Records of a launched run that are damaged: each is named, or counts as not written yet; none is half believed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.errors import LaunchError
from launchers.folder.atomic import replaced, write_text
from launchers.folder.run_folder import RunFolder, last_metrics, read_json
from launchers.job import conductor
from launchers.job.heartbeat import Heartbeat
from launchers.job.status import row
from launchers.local.lock import RunLock, read_holder
from launchers.slurm.site import load_site
from qwen_moe.launch import array, prepare

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


PLAN = {"nodes": ["n1"], "saved_step": 4, "time": 2.0}


def test_a_whole_plan_is_believed(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run.launch / "attempts/001/plan.json").write_text(json.dumps(PLAN))
    assert run.attempts()[0].plan() == PLAN


@pytest.mark.parametrize("plan", [5, [], "x", PLAN | {"nodes": 1}, PLAN | {"saved_step": "4"}, {"nodes": []}])
def test_a_damaged_plan_counts_as_none(tmp_path: Path, plan: Any) -> None:
    run = write_run(tmp_path)
    (run.launch / "attempts/001/plan.json").write_text(json.dumps(plan))
    assert run.attempts()[0].plan() is None


@pytest.mark.parametrize("content", ["", "5", "[]", '"x"', "{"])
def test_a_damaged_launch_file_is_written_anew_by_launch(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path)
    run.facts_file.write_text(content)
    prepare.check_not_running(run, "name", [])
    plan: Any = SimpleNamespace(run=run)
    assert array._choose([plan], {}) == ([plan], [])


@pytest.mark.parametrize("content", [None, "", "5", "{}", "[]", "[5]", '["a", null]'])
@pytest.mark.parametrize("task", ["1", ""])
def test_an_arrays_list_that_is_damaged_is_named(
    tmp_path: Path, content: str | None, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tasks.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    assert conductor.main(["--array", str(path), "--", "srun"]) == 2
    assert f"error: {path} does not say which run task" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"-1 x", b"\xff\xfe", b"9" * 400, b"1 2 3 4\n" * 99, b"[]"])
def test_a_lock_with_any_content_is_a_lock(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with_it = RunLock(tmp_path)  # the content of a lock that nobody holds is without effect
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(LaunchError, match="is in use by"):
        RunLock(tmp_path)
    with_it.close()
    (tmp_path / "lock").write_bytes(b"junk")
    assert read_holder(tmp_path).text() == "an unknown process (the lock file does not say which)"


@pytest.mark.parametrize("content", [None, b"\xff", b"[slurm", b"[slurm]\npartition = "])
def test_a_site_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "site.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LaunchError, match=f"site file {path} (does not exist|cannot be read)"):
        load_site(path)
    with pytest.raises(LaunchError, match="cannot be read"):
        load_site(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "code.tar.gz"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replaced(path, private=True) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replaced(path, private=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600


def test_a_heartbeat_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr("os.fsync", waits.append)
    Heartbeat(tmp_path / "rank-00003.json", rank=3).beat(7)
    assert read_json(tmp_path / "rank-00003.json")["step"] == 7 and waits == []
    write_text(tmp_path / "text", "")
    assert len(waits) == 1
