"""`qwen-moe rollout`: what it writes, the same bytes after a stop at any moment, and that nothing sampled is lost."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from qwen_moe.checkpoint.huggingface.convert import from_pretrained
from qwen_moe.cli import main
from qwen_moe.errors import UserError
from qwen_moe.rollout import store as store_module
from qwen_moe.rollout.queries import read_queries
from qwen_moe.rollout.store import Store, read_manifest, read_rollouts
from qwen_moe.rollout.summary import by_variance, figures, mean_and_variance, read_variances
from tests.rollout.conftest import read_lines, tokenizer, write_lines

QUERIES: list[Any] = [
    {"prompt": "abc", "answer": "e", "id": "x"},
    {"messages": [{"role": "user", "content": "hi"}], "answer": "a"},
    {"tokens": [1, 2, 3], "answer": "b", "bonus": 2},
    *({"prompt": "k" * n, "answer": "q"} for n in range(1, 6)),
]
OPTIONS = ["--samples", "3", "--max-new-tokens", "8", "--queries-per-file", "3", "--reward-workers", "2"]
REWARD = ["--reward", "contains", "format:[aeiou]", "--reward-weights", "1", "0.5"]


def rollout(hf: Path, source: Path, out: Path, *more: object, reward: list[str] = REWARD) -> int:
    arguments = ["rollout", "--checkpoint", str(hf), "--input", str(source), "--output", str(out)]
    return main([*arguments, *OPTIONS, *reward, *map(str, more)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("queries") / "q.jsonl", QUERIES)


@pytest.fixture(scope="module")
def finished(hf: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rollouts") / "out"
    assert rollout(hf, source, out) == 0
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def samples(folder: Path) -> list[list[tuple[list[int], list[float]]]]:
    _, rows = read_rollouts(folder)
    return [[(one["tokens"], one["log_probs"]) for one in row["samples"]] for row in rows]


def test_what_is_kept(hf: Path, source: Path, finished: Path) -> None:
    manifest, rows = read_rollouts(finished)
    found = list(rows)
    queries = read_queries(source, tokenizer())
    assert [(row["number"], row["id"], row["values"], row["prompt_tokens"]) for row in found] == [
        (query.number, query.id, query.values, query.tokens) for query in queries
    ]
    assert not list(finished.glob("unscored*")) and not list(finished.parent.glob("*.lock"))
    end = tokenizer().eos_token_id
    for row in found:
        assert len(row["samples"]) == 3
        for one in row["samples"]:
            stopped = one["tokens"][-1] == end
            assert one["finish_reason"] == ("stop" if stopped else "length")
            assert one["text"] == tokenizer().decode(one["tokens"][:-1] if stopped else one["tokens"])
            vowel = float(any(letter in one["text"] for letter in "aeiou"))
            assert one["parts"]["format:[aeiou]"] == vowel
            assert one["reward"] == one["parts"]["contains"] + 0.5 * vowel
    assert manifest["sampling"]["samples"] == 3 and manifest["sampling"]["temperature"] == 1
    assert manifest["reward"]["rewards"] == ["contains", "format:[aeiou]"]


def test_one_bar_counts_all_queries(hf: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars of answers begin anew with every file of queries."""
    bars: list[Any] = []

    def counted(total: int, left: int) -> Any:
        bars.append(tqdm(total=total, initial=total - left, disable=False, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr("qwen_moe.rollout.run.counter", counted)
    assert rollout(hf, source, tmp_path / "out") == 0
    assert [(bar.total, bar.initial, bar.n) for bar in bars] == [(8, 0, 8)]
    (tmp_path / "out" / "rollouts-00001.jsonl").unlink()
    assert rollout(hf, source, tmp_path / "out") == 0
    assert [(bar.total, bar.initial, bar.n) for bar in bars[1:]] == [(8, 5, 8)]


def test_log_probs_are_those_of_the_model(hf: Path, finished: Path) -> None:
    """One forward pass over prompt and answer gives the same, in float64 to the rounding of float32."""
    model = from_pretrained(hf, dtype=torch.float64)
    for row in read_rollouts(finished)[1]:
        for one in row["samples"]:
            ids = torch.tensor([row["prompt_tokens"] + one["tokens"]])
            log_probs = model(ids)[0].log_softmax(-1)[len(row["prompt_tokens"]) - 1 : -1]
            expected = log_probs.gather(-1, torch.tensor(one["tokens"]).unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(torch.tensor(one["log_probs"]).double(), expected, atol=1e-5, rtol=0)


def test_the_summary(
    finished: Path, capsys: pytest.CaptureFixture[str], hf: Path, source: Path, tmp_path: Path
) -> None:
    summary = read_manifest(finished)["summary"]
    rewards = [[one["reward"] for one in row["samples"]] for row in read_rollouts(finished)[1]]
    table = torch.tensor(rewards, dtype=torch.float64)
    assert math.isclose(summary["mean_reward"], float(table.mean()))
    assert math.isclose(summary["variance_within_groups"], float(table.var(1).mean()), abs_tol=1e-15)
    assert summary["groups_without_variance"] == sum(len(set(row)) == 1 for row in rewards) / len(rewards)
    variances = {name: row["variance"] for name, row in read_variances(finished).items()}
    assert list(variances) == [row["id"] for row in read_rollouts(finished)[1]]
    assert variances == pytest.approx({k: float(v) for k, v in zip(variances, table.var(1), strict=True)}, abs=1e-15)
    ordered = by_variance(read_queries(source, tokenizer()), finished)
    assert [variances[query.id] for query in ordered] == sorted(variances.values(), reverse=True)
    assert len({query.id for query in ordered}) == len(QUERIES)
    other = read_queries(write_lines(tmp_path / "other.jsonl", [QUERIES[0], *QUERIES[2:]]), tokenizer())
    with pytest.raises(
        UserError, match=r"6 of 7 queries have another prompt than in the rollouts .* \(id '1' is the first"
    ):
        by_variance(other, finished)
    # The same command again does nothing, and prints it.
    before = content(finished)
    assert rollout(hf, source, finished) == 0
    assert "8 queries, 24 answers: mean reward" in capsys.readouterr().out and content(finished) == before


def test_equal_rewards_have_no_variance() -> None:
    assert mean_and_variance([0.1] * 3) == (0.1, 0.0) and mean_and_variance([2.0]) == (2.0, 0.0)
    assert mean_and_variance([0.0, 1.0]) == (0.5, 0.5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_a_stop_at_any_write_changes_no_byte(
    hf: Path, source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    real = {"write_text": store_module.write_text, "write_json": store_module.write_json}

    def stopping(name: str, numbers: Iterator[int], limit: int) -> Any:
        def write(*arguments: Any) -> None:
            number = next(numbers)  # two threads write: each keeps the number of its own write
            if number > limit or (number == limit and not after):
                raise Killed
            real[name](*arguments)
            if number == limit:
                raise Killed

        return write

    for limit in range(1, 20):
        out, numbers = tmp_path / f"out{limit}", itertools.count(1)
        for name in real:
            monkeypatch.setattr(store_module, name, stopping(name, numbers, limit))
        try:
            rollout(hf, source, out)
        except Killed:
            monkeypatch.undo()
            assert rollout(hf, source, out) == 0
            assert content(out) == content(finished)
            continue
        assert limit == 10  # manifest, three times samples and scores, variances and manifest
        break


def test_kill_9(hf: Path, source: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qwen_moe", "rollout", "--checkpoint", str(hf), "--input", str(source)]
    command += ["--output", str(out), *OPTIONS, *REWARD]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("*00000.jsonl")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert rollout(hf, source, out) == 0
    assert content(out) == content(finished)


def test_a_reward_that_fails_loses_no_samples(
    hf: Path, source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def reward(prompt, completion, row):\n    return float(row['missing'])\n")
    out, own = tmp_path / "out", ["--reward", "mine:reward"]
    assert rollout(hf, source, out, reward=own) == 2
    message = capsys.readouterr().err
    assert (
        "mine:reward raised an exception (query x: KeyError: 'missing'" in message and "All samples are kept" in message
    )
    kept = content(out)["unscored-00000.jsonl"]
    # The corrected function scores the samples that are there.
    (tmp_path / "mine.py").write_text("def reward(prompt, completion, row):\n    return len(completion)\n")
    assert rollout(hf, source, out, reward=own) == 0
    assert samples(out) == samples(finished)
    assert [one["tokens"] for one in json.loads(kept.splitlines()[0])["samples"]] == [t for t, _ in samples(out)[0]]
    for row in read_rollouts(out)[1]:
        assert all(one["reward"] == len(one["text"]) for one in row["samples"])


def test_another_reward_scores_the_same_samples_anew(
    hf: Path, source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert rollout(hf, source, out, reward=["--reward", "exact"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("qwen_moe.generation.session.Session.generate", None)
        assert rollout(hf, source, out) == 0
    assert content(out) == content(finished)


def test_failures_count_as_zero_if_asked(hf: Path, source: Path, tmp_path: Path, capsys: Any) -> None:
    own = ["--reward", "tests.rollout.functions:misbehaves", "exact", "--on-reward-failure", "zero"]
    assert rollout(hf, source, tmp_path / "out", reward=[*own, "--reward-seconds", "5"]) == 0
    assert "failed" not in capsys.readouterr().out
    rows = [{"number": 0, "id": "0", "values": {"prompt": "a"}, "samples": [
        {"tokens": [1, 2], "finish_reason": "length", "reward": 0.0, "parts": {"a": 0.0}, "failed": ["a"]},
        {"tokens": [1], "finish_reason": "stop", "reward": 1.0, "parts": {"a": 1.0}, "failed": []},
    ]}]  # fmt: skip
    summary, _ = figures(rows)
    assert summary["failed"] == {"a": 1} and summary["truncated"] == 0.5 and summary["mean_length"] == 1.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", "1"], "seed 0 is now 1"),
        (["--temperature", "0.5"], "temperature 1.0 is now 0.5"),
        (["--batch-size", "7"], "batch_size 64 is now 7"),
        (["--queries-per-file", "2"], "queries_per_file 3 is now 2"),
    ],
)
def test_other_settings_are_refused(
    hf: Path, source: Path, finished: Path, capsys: Any, changed: Any, message: str
) -> None:
    before = content(finished)
    assert rollout(hf, source, finished, *changed) == 2
    assert message in capsys.readouterr().err and content(finished) == before


def test_a_short_query_among_long_ones_needs_no_extension(hf: Path, tmp_path: Path, capsys: Any) -> None:
    """All are read with the extension that the longest needs, as `generate` reads them; a length of its own is checked."""
    lines = [{"prompt": "abc", "answer": "e"}, {"prompt": "k" * 60, "answer": "q"}]
    source = write_lines(tmp_path / "q.jsonl", lines)
    extension = ["--context-extension", "yarn"]
    assert rollout(hf, source, tmp_path / "out", *extension) == 0
    arguments = ["generate", "--checkpoint", str(hf), "--input", str(source), "--output", str(tmp_path / "answers")]
    drawn = ["--samples", "3", "--max-new-tokens", "8", "--temperature", "1", "--top-p", "1"]
    assert main([*arguments, *drawn, *extension]) == 0
    answers = read_lines(tmp_path / "answers")
    assert [[one["tokens"] for one in row["completions"]] for row in answers] == [
        [tokens for tokens, _ in row] for row in samples(tmp_path / "out")
    ]
    short = write_lines(tmp_path / "short.jsonl", lines[:1])
    assert rollout(hf, short, tmp_path / "none", *extension) == 2
    assert "the model reaches 64 tokens and the longest text has 11" in capsys.readouterr().err


def test_mistakes_are_found_before_anything_is_sampled(hf: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b"},
        {"prompt": "k" * 60, "answer": "1"},
        {"tokens": [52, 53], "answer": 1},
    ]
    source = write_lines(tmp_path / "q.jsonl", lines)
    assert rollout(hf, source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "3 of 4 queries cannot be used" in error and not (tmp_path / "out").exists()
    for part in (
        'line 2: reward contains needs "answer"',
        "line 3: a prompt of 60 tokens and 8 new",
        "line 4: the prompt has token 53",
    ):
        assert part in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    source = write_lines(tmp_path / "good.jsonl", lines[:1])
    assert rollout(hf, source, tmp_path / "full") == 2
    assert "holds notes.txt and no rollouts" in capsys.readouterr().err


def test_damage_is_named_and_repaired(hf: Path, source: Path, finished: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert rollout(hf, source, out) == 0
    path = out / "rollouts-00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"reward": ', b'"reward":  ', 1))
    with pytest.raises(UserError, match=r"rollouts-00001.jsonl is damaged"):
        read_rollouts(out)
    assert rollout(hf, source, out) == 2 and "is damaged" in capsys.readouterr().err
    variances = (out / "variances.jsonl").read_bytes()
    (out / "variances.jsonl").write_bytes(variances.replace(b"0", b"1", 1))
    with pytest.raises(UserError, match=r"variances.jsonl is damaged"):
        read_variances(out)
    (out / "variances.jsonl").write_bytes(variances)
    path.unlink()
    with pytest.raises(UserError, match=r"rollouts-00001.jsonl is missing"):
        read_rollouts(out)
    assert rollout(hf, source, out) == 0 and content(out) == content(finished)


def test_a_damaged_line_of_an_unfinished_folder_is_named(
    hf: Path, source: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert rollout(hf, source, out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"], manifest["summary"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    path = out / "rollouts-00002.jsonl"
    path.write_text(path.read_text().replace('"log_probs"', '"log"', 1))
    assert rollout(hf, source, out) == 2
    assert f"{path}, line 1 is not a query with its samples: remove the file" in capsys.readouterr().err
    path.unlink()
    assert rollout(hf, source, out) == 0 and content(out) == content(finished)


def test_a_folder_that_was_begun_with_a_setting_that_is_left_out_now(tmp_path: Path) -> None:
    Store(tmp_path, {"attention": "sparse", "kept_share": 0.05}, {}, 4, 2)
    with pytest.raises(UserError, match=r"sampled with other settings \(kept_share 0.05 is now None\)"):
        Store(tmp_path, {"attention": "sparse"}, {}, 4, 2)


def test_an_unfinished_folder_is_not_read(tmp_path: Path) -> None:
    Store(tmp_path / "out", {"seed": 1}, {}, 4, 2)
    for read in (read_rollouts, read_variances):
        with pytest.raises(UserError, match="is not finished: run the same"):
            read(tmp_path / "out")
    with pytest.raises(UserError, match=r"manifest.*does not exist"):
        read_rollouts(tmp_path)


def test_what_is_drawn_does_not_depend_on_the_files(hf: Path, source: Path, finished: Path, tmp_path: Path) -> None:
    """`generate` draws the same, too."""
    assert rollout(hf, source, tmp_path / "out", "--queries-per-file", 8) == 0
    tokens = [[t for t, _ in row] for row in samples(tmp_path / "out")]
    assert tokens == [[t for t, _ in row] for row in samples(finished)]
    command = ["generate", "--checkpoint", str(hf), "--input", str(source), "--output", str(tmp_path / "answers.jsonl")]
    assert main([*command, *OPTIONS[:4], "--temperature", "1", "--top-p", "1"]) == 0
    answers = [[one["tokens"] for one in row["completions"]] for row in read_lines(tmp_path / "answers.jsonl")]
    assert answers == tokens


def test_several_processes_draw_the_same(hf: Path, source: Path, finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen_moe", "rollout", "--checkpoint", str(hf), "--input", str(source)]
    command += ["--output", str(tmp_path / "out"), *OPTIONS, *REWARD, "--ep", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 queries, 24 answers" in done.stdout
    assert [[t for t, _ in row] for row in samples(tmp_path / "out")] == [
        [t for t, _ in row] for row in samples(finished)
    ]
    assert [row["id"] for row in read_lines(tmp_path / "out" / "variances.jsonl")] == ["x", *map(str, range(1, 8))]
