"""The runner with a stand-in for a model: stopped anywhere, continued, shared, and refused what does not belong together."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.alone import alone
from qwen_moe.errors import UserError
from qwen_moe.evaluation import run as run_module
from qwen_moe.evaluation.answers import AnswerFile, claim_folder, read_all, read_answers
from qwen_moe.evaluation.plan import Evaluation, depths
from qwen_moe.evaluation.results import as_text, grid_of
from qwen_moe.evaluation.run import run_evaluation
from qwen_moe.evaluation.tasks.haystack import read_essay
from qwen_moe.evaluation.tasks.passkey import passkey_task
from qwen_moe.evaluation.tasks.ruler import OFFLINE, ruler_tasks
from tests.evaluation.solver import Solver, misses_depths

LENGTHS = (150, 300)


def passkeys(solver: Solver, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "kind": "passkey",
        "tasks": {"passkey": passkey_task(5, solver.encode)},
        "lengths": LENGTHS,
        "depths": depths(5),
        "samples": 1,
        "seed": 0,
    } | changes
    asked = {
        "kind": "passkey",
        "lengths": list(values["lengths"]),
        "depths": len(values["depths"]),
        "seed": values["seed"],
    }
    return Evaluation(**values, asked=asked)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key != "seconds"}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


class Stop(Exception):
    pass


def stop_at(count: int) -> Any:
    def before(done: int) -> None:
        if done == count:
            raise Stop

    return before


def test_every_key_is_found(tokenizer: Any, tmp_path: Path) -> None:
    solver = Solver(tokenizer)
    results = run_evaluation(passkeys(solver), solver, tmp_path / "out")
    assert results is not None and results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [
        (cell["length"], cell["depth"], cell["score"], cell["exact"], cell["samples"]) for cell in results["scores"]
    ] == [(length, depth, 100, 100, 1) for length in LENGTHS for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert results["model"] == "solver" and results["tokenizer"] == "trained" and results["asked"]["seed"] == 0
    for cell in results["scores"]:
        least, most = cell["prompt_tokens"]
        assert cell["length"] - 6 - 7 <= least == most <= cell["length"] - 7  # 5 digits and 2 more are generated


def test_missed_depths_show(tokenizer: Any, tmp_path: Path) -> None:
    solver = Solver(tokenizer, misses=misses_depths(0.4, 0.6))
    results = run_evaluation(passkeys(solver, lengths=(600, 900)), solver, tmp_path)
    assert results is not None
    lengths, rows, scores = grid_of(results)
    assert (lengths, rows) == ([600, 900], [0, 0.25, 0.5, 0.75, 1])
    assert scores == [[100, 100], [100, 100], [0, 0], [100, 100], [100, 100]]
    assert as_text(results).splitlines() == [
        "passkey: exact matches in percent, 1 prompt for each cell",
        "tokens         600     900",
        *(
            f"depth {depth:<4}  {a:6.1f}  {b:6.1f}"
            for depth, (a, b) in zip(("0%", "25%", "50%", "75%", "100%"), scores)
        ),
        "mean          80.0    80.0",
    ]


def test_the_table_says_what_sparse_attention_kept(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = Solver(tokenizer)
    longest = {"kept": 0.25, "kept_worst_layer": 0.125, "work": 0.0625}
    monkeypatch.setattr(solver, "reading", lambda: longest if solver.batches[-1][0][-1] > 400 else {})
    results = run_evaluation(passkeys(solver, lengths=(300, 600)), solver, tmp_path)
    assert results is not None and as_text(results).splitlines()[-4:] == [
        "mean                  100.0   100.0",
        "attention kept                25.0%",
        "in the worst layer            12.5%",
        "pairs against dense            6.2%",
    ]


def test_it_says_so_before_prompts_that_may_take_long(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6, 30))  # every look at it is 30 seconds after the one before
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: float(next(clock)))
    solver = Solver(tokenizer)
    evaluation = passkeys(solver, lengths=(200, 2000))
    evaluation.asked["attention"] = "dense"
    run_evaluation(evaluation, solver, tmp_path, progress=True)
    assert "5 prompts of 2,000 tokens may take 70 min each: one of 200 takes 42 s, and" in capsys.readouterr().err


def test_all_offline_tasks_of_ruler(tokenizer: Any, tmp_path: Path) -> None:
    solver = Solver(tokenizer, misses=lambda text: "coded text" in text)
    tasks = ruler_tasks(OFFLINE, read_essay(None), {}, 3)
    evaluation = Evaluation(
        kind="ruler", tasks=tasks, lengths=(1000, 4096), depths=(None,), samples=3, seed=5, asked={"seed": 5}
    )
    results = run_evaluation(evaluation, solver, tmp_path)
    assert results is not None
    assert {(cell["task"], cell["score"]) for cell in results["scores"]} == {
        (name, 0.0 if name == "fwe" else 100.0) for name in OFFLINE
    }
    assert [cell["score"] for cell in results["by_length"]] == [90.91, 90.91]  # 10 of 11 tasks
    assert "niah_multikey_1   100.0   100.0" in as_text(results) and "fwe                 0.0     0.0" in as_text(
        results
    )


def test_short_prompts_are_completed_together(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "BATCH_TOKENS", 600)
    solver = Solver(tokenizer)
    run_evaluation(passkeys(solver, lengths=(150, 300, 700)), solver, tmp_path)
    assert [len(prompts) for prompts, _ in solver.batches] == [4, 1, 2, 2, 1, 1, 1, 1, 1, 1]
    assert {new for _, new in solver.batches} == {7}


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_a_stopped_evaluation_continues(
    count: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what has no answer is completed, and the results are those of an evaluation that was not stopped."""
    monkeypatch.setattr(run_module, "BATCH_TOKENS", 300)
    whole = Solver(tokenizer)
    expected = run_evaluation(passkeys(whole), whole, tmp_path / "whole")
    stopped = Solver(tokenizer, before=stop_at(count))
    with pytest.raises(Stop):
        run_evaluation(passkeys(stopped), stopped, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists() and len(read_all(tmp_path / "out")) == count
    solver = Solver(tokenizer)
    assert without_times(run_evaluation(passkeys(solver), solver, tmp_path / "out")) == without_times(expected)
    assert solver.count == 10 - count
    again = Solver(tokenizer)
    assert without_times(run_evaluation(passkeys(again), again, tmp_path / "out")) == without_times(expected)
    assert again.count == 0


def test_a_killed_process_loses_the_running_prompt_only(tokenizer: Any, tmp_path: Path) -> None:
    def kill(count: int) -> None:
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        victim = Solver(tokenizer, before=kill)
        run_evaluation(passkeys(victim), victim, tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(read_all(tmp_path)) == 3
    solver = Solver(tokenizer)
    assert run_evaluation(passkeys(solver), solver, tmp_path) is not None and solver.count == 7


@pytest.mark.parametrize("end", [b'{"task": "pass', b'{"task": "pass\n', b"\0\0\0\0", b"\0\0\n", b"{}\n", b"\xff"])
def test_a_broken_last_line_is_dropped(end: bytes, tokenizer: Any, tmp_path: Path) -> None:
    stopped = Solver(tokenizer, before=stop_at(4))
    with pytest.raises(Stop):
        run_evaluation(passkeys(stopped), stopped, tmp_path)
    path = tmp_path / "answers-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    solver = Solver(tokenizer)
    results = run_evaluation(passkeys(solver), solver, tmp_path)
    assert results is not None and results["by_length"][0]["score"] == 100 and solver.count == 6
    assert path.read_bytes().startswith(whole) and len(read_answers(path)[0]) == 10


@pytest.mark.parametrize(
    "change", [("{", "["), ('"sample": 0', '"sample": "0"'), ('"task": ', '"tusk": '), ("150", "true")]
)
def test_a_damaged_line_is_named(change: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    solver = Solver(tokenizer)
    run_evaluation(passkeys(solver), solver, tmp_path)
    path = tmp_path / "answers-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace(*change), *lines[3:]]))
    with pytest.raises(UserError, match=r"answers-0\.jsonl:3 is damaged \(its? .*\): remove the line"):
        run_evaluation(passkeys(solver), solver, tmp_path)


def test_other_settings_need_another_folder(tokenizer: Any, tmp_path: Path) -> None:
    solver = Solver(tokenizer)
    run_evaluation(passkeys(solver), solver, tmp_path)
    before = (tmp_path / "answers-0.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"another evaluation \(seed: 0 there, 1 now\): give the same options, or another"
    ):
        run_evaluation(passkeys(solver, seed=1), solver, tmp_path)
    other = Solver(tokenizer)
    other.identity = {"model": "other", "tokenizer": "trained"}
    with pytest.raises(UserError, match=r'\(model: "solver" there, "other" now\)'):
        run_evaluation(passkeys(other), other, tmp_path)
    assert (tmp_path / "answers-0.jsonl").read_bytes() == before


def test_folders_of_other_things_stay_as_they_are(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    solver = Solver(tokenizer)
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="is not empty and holds no evaluation: give another --output"):
            run_evaluation(passkeys(solver), solver, place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"] and solver.count == 0


def test_nothing_is_written_before_the_checks(tokenizer: Any, tmp_path: Path) -> None:
    solver = Solver(tokenizer)
    with pytest.raises(UserError, match="--lengths 20 is too short"):
        run_evaluation(passkeys(solver, lengths=(20, 300)), solver, tmp_path / "out")
    assert not (tmp_path / "out").exists() and solver.count == 0


def test_shards_share_the_prompts(tokenizer: Any, tmp_path: Path) -> None:
    """The last shard makes the results; another number of shards continues what others left."""
    whole = Solver(tokenizer)
    expected = run_evaluation(passkeys(whole), whole, tmp_path / "whole")
    counts = []
    for index in range(3):
        solver = Solver(tokenizer)
        found = run_evaluation(passkeys(solver), solver, tmp_path / "out", shard=(index, 3))
        counts.append(solver.count)
        assert (found is None) == (index < 2)
    assert counts == [4, 3, 3] and without_times(found) == without_times(expected)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == [f"answers-{i}.jsonl" for i in range(3)]
    for shard in ((1, 3), (0, 1)):
        solver = Solver(tokenizer)
        found = run_evaluation(passkeys(solver), solver, tmp_path / "two", shard=shard)
    assert solver.count == 7 and without_times(found) == without_times(expected)


def test_of_two_evaluations_that_claim_a_folder_at_once_the_second_finds_the_settings_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the folder would have the answers of one and the settings of the other."""
    folder, found = tmp_path / "new", []

    def second() -> None:
        try:
            claim_folder(folder, {"seed": 2})
        except UserError as error:
            found.append(str(error))

    folder.mkdir()
    with alone(folder / "settings.json"):
        thread = threading.Thread(target=second)
        thread.start()
        told, end = "", time.monotonic() + 30
        while "waiting for it" not in told and time.monotonic() < end:
            told += capsys.readouterr().err
            time.sleep(0.02)
        (folder / "settings.json").write_text('{"seed": 1}')
    thread.join(30)
    assert len(found) == 1 and "holds the answers to another evaluation (seed: 1 there, 2 now)" in found[0]
    assert "trained further" not in found[0]
    (folder / "settings.json").write_text('{"model": "a"}')
    with pytest.raises(
        UserError, match=r"model: \"a\" there, \"b\" now\).*The model is another one, or was trained further"
    ):
        claim_folder(folder, {"model": "b"})
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_two_processes_of_one_shard_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    solver = Solver(tokenizer)
    evaluation = passkeys(solver)
    claim_folder(tmp_path, evaluation.asked | solver.identity)
    with AnswerFile(tmp_path, 0):
        with pytest.raises(UserError, match=r"answers-0\.jsonl is being written by another process"):
            run_evaluation(evaluation, solver, tmp_path)
        assert run_evaluation(evaluation, solver, tmp_path, shard=(1, 2)) is None
    assert run_evaluation(evaluation, solver, tmp_path) is not None
