"""`qwen-moe data pairs`: which answers are paired, and that the files are those of `qwen-moe data chat`."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_moe.cli import main
from qwen_moe.data.content import document_lengths, token_dtype
from qwen_moe.data.examples import PackedExamples
from qwen_moe.data.manifest import bin_path, column_path, read_manifest
from qwen_moe.data.rows import ExampleSet, Order
from qwen_moe.errors import UserError
from qwen_moe.rollout.pairs import FAILED, NEAR_DUPLICATE, SAME, TRUNCATED, Pair, PairRules, pairs_of
from qwen_moe.rollout.store import TOKENIZER, Row, Store
from qwen_moe.rollout.summary import figures
from tests.rollout.conftest import read_lines, tokenizer, write_lines

END = "<|im_end|>"


def sample(text: str, reward: float, truncated: bool = False, failed: bool = False) -> Row:
    tokens = tokenizer()(text + ("" if truncated else END))["input_ids"]
    why = {"finish_reason": "length" if truncated else "stop", "failed": ["r"] if failed else [], "why": ""}
    return {"tokens": tokens, "log_probs": [-1.0] * len(tokens), "text": text, "reward": reward, "parts": {}} | why


def row(*samples: Row, number: int = 0, question: str = "hi") -> Row:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return {
        "number": number, "id": f"q{number}", "values": {"messages": messages}, "prompt_tokens": prompt,
        "samples": list(samples),
    }  # fmt: skip


def pairs(query: Row, **rules: Any) -> tuple[list[tuple[int, int]], Counter[str]]:
    left_out: Counter[str] = Counter()
    found = pairs_of(query, PairRules(**rules), left_out)
    return [(pair.chosen, pair.rejected) for pair in found], left_out


def stored(folder: Path, *rows: Row) -> Path:
    """A finished folder of rollouts with these rows, two to a file."""
    settings = {"vocab_size": 60, "end_tokens": [tokenizer().eos_token_id]}
    store = Store(folder, settings, {"rewards": ["exact"]}, len(rows), 2)
    tokenizer().save_pretrained(folder / TOKENIZER)
    for index in store.to_sample():
        store.add_scores(index, [rows[number] for number in store.numbers(index)])
    store.finish(*figures(store.rows()))
    return folder


def test_the_best_with_the_worst() -> None:
    query = row(sample("a", 1), sample("b", 3), sample("c", 0), sample("d", 2))
    assert pairs(query)[0] == [(1, 2)]
    assert pairs(query, per_query=0)[0] == [(1, 2), (3, 0)]
    assert pairs(row(sample("a", 1), sample("b", 1)))[0] == []


def test_what_passes_with_what_fails() -> None:
    query = row(sample("a", 1), sample("b", 0), sample("c", 0.9), sample("d", 1), sample("e", 2))
    found, _ = pairs(query, rule="pass-fail", per_query=0)
    assert sorted(found) == [(c, r) for c in (0, 3, 4) for r in (1, 2)]
    assert len({c for c, _ in found[:3]}) == 3 and len({r for _, r in found[:2]}) == 2
    assert pairs(query, rule="pass-fail", passing=2.0, per_query=0)[0].count((4, 0)) == 1
    drawn = {tuple(pairs(query, rule="pass-fail", seed=seed)[0]) for seed in range(20)}
    assert len(drawn) > 2 and all(len(one) == 1 for one in drawn)
    assert pairs(query, rule="pass-fail", seed=3) == pairs(query, rule="pass-fail", seed=3)


def test_all_pairs_of_different_rewards() -> None:
    query = row(sample("a", 1), sample("b", 0), sample("c", 1), sample("d", 2))
    everything = [(0, 1), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert sorted(pairs(query, rule="all", per_query=0)[0]) == everything
    some = pairs(query, rule="all", per_query=3)[0]
    assert len(set(some)) == 3 and set(some) <= set(everything)


def test_what_is_left_out_is_counted() -> None:
    query = row(
        sample("yes.", 1),
        sample("YES", 1),
        sample("no", 0),
        sample("long", 0, truncated=True),
        sample("x", 0, failed=True),
    )
    found, left_out = pairs(query, rule="all", per_query=0)
    assert found == [(0, 2)] and left_out == {NEAR_DUPLICATE: 1, TRUNCATED: 1, FAILED: 1}
    found, left_out = pairs(query, rule="all", per_query=0, truncated="rejected")
    assert found == [(0, 2), (0, 3)] and TRUNCATED not in left_out
    # A truncated answer is never chosen, and equal answers make no pair whatever their rewards.
    best = row(sample("long", 5, truncated=True), sample("a", 1), sample("b", 0))
    assert pairs(best, truncated="rejected")[0] == [(1, 2)]
    assert pairs(row(sample("a", 1), sample("a", 0))) == ([], Counter({SAME: 1}))
    # Near-duplicates of different rewards are pairs, and punctuation alone is not nothing.
    assert pairs(row(sample("yes.", 1), sample("yes", 0)))[0] == [(0, 1)]
    assert NEAR_DUPLICATE not in pairs(row(sample(".", 1), sample("", 1), sample("b", 0)))[1]


@given(st.data())
def test_every_rule_keeps_its_promises(data: Any) -> None:
    letters = st.sampled_from(["a", "b", "c", "d.", "D", "e"])
    drawn = st.tuples(letters, st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans())
    query = row(*(sample(*one) for one in data.draw(st.lists(drawn, min_size=1, max_size=8))))
    rules = PairRules(
        rule=data.draw(st.sampled_from(["best-worst", "pass-fail", "all"])),
        per_query=data.draw(st.integers(0, 4)),
        truncated=data.draw(st.sampled_from(["drop", "rejected"])),
    )
    found = pairs_of(query, rules, Counter())
    assert len(set(found)) == len(found) and (not rules.per_query or len(found) <= rules.per_query)
    for pair in found:
        chosen, rejected = query["samples"][pair.chosen], query["samples"][pair.rejected]
        assert chosen["reward"] > rejected["reward"] and chosen["tokens"] != rejected["tokens"]
        assert chosen["finish_reason"] == "stop" and not chosen["failed"] and not rejected["failed"]
        assert rules.truncated == "rejected" or rejected["finish_reason"] == "stop"
    assert found == pairs_of(query, rules, Counter()) and all(isinstance(pair, Pair) for pair in found)


def documents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    lengths = document_lengths(prefix)
    ids, learn = np.fromfile(bin_path(prefix), token_dtype(prefix)), np.fromfile(column_path(prefix, "learn"), np.uint8)
    ends = np.cumsum(lengths)
    return [(ids[e - n : e].tolist(), learn[e - n : e].tolist()) for n, e in zip(lengths, ends, strict=True)]


def questions(count: int) -> list[Row]:
    """Each has one right answer and one wrong one."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 9))).strip() or "x" for _ in range(count)]
    return [row(sample("no " + w, 0), sample(w + ".", 1), number=n, question=w) for n, w in enumerate(words)]


def test_files_are_those_of_data_chat(tmp_path: Path) -> None:
    """Its documents end with the line end that the template writes after the end token, which is not learned."""
    rows = questions(7)
    rollouts = stored(tmp_path / "rollouts", *rows)
    assert main(["data", "pairs", str(rollouts), "--output", str(tmp_path / "pairs")]) == 0
    lines = [
        {
            "prompt": one["values"]["messages"],
            "chosen": one["samples"][1]["text"],
            "rejected": one["samples"][0]["text"],
        }
        for one in rows
    ]
    source = write_lines(tmp_path / "chat.jsonl", lines)
    arguments = ["--input", str(source), "--tokenizer", str(rollouts / TOKENIZER), "--output", str(tmp_path / "chat")]
    assert main(["data", "chat", *arguments]) == 0
    newline = tokenizer()("\n")["input_ids"]
    expected = [(ids[:-1], learn[:-1]) for ids, learn in documents(tmp_path / "chat")]
    assert documents(tmp_path / "pairs") == expected
    assert all(ids[-1:] == newline and learn[-1] == 0 for ids, learn in documents(tmp_path / "chat"))
    ours, theirs = read_manifest(tmp_path / "pairs"), read_manifest(tmp_path / "chat")
    assert ours is not None and theirs is not None
    for name in (
        "kind",
        "documents",
        "end_of_document_id",
        "template_sha256",
        "tokenizer_identity",
        "tokenizer_sha256",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.counts["learned_tokens"] == theirs.counts["learned_tokens"] and ours.counts["pairs"] == 7


def test_training_reads_them(tmp_path: Path) -> None:
    rows = questions(5)
    rollouts = stored(tmp_path / "rollouts", *rows)
    assert main(["data", "pairs", str(rollouts), "--output", str(tmp_path / "pairs")]) == 0
    order = Order(length=96, seed=0)
    read = PackedExamples([ExampleSet(prefix=tmp_path / "pairs")], order, vocab_size=60, cache=tmp_path)
    read.judge_by(["preference"])  # the chosen answer is the better one
    assert read.kind == "pairs" and read.rows.examples == 5
    met = 0
    for number in range(len(read.rows)):
        batch = read.train_batch(number, 1)
        placed = read.placed(number)
        for one in placed:
            at = slice(one.start, one.start + one.length)
            query = rows[one.example]
            answer = query["samples"][1 - one.document % 2]["tokens"]  # documents 2p are chosen
            assert batch["input_ids"][0, at].tolist() == query["prompt_tokens"] + answer
            learned = batch["labels"][0, at]
            assert learned[learned >= 0].tolist() == answer and learned[len(query["prompt_tokens"]) - 1] == answer[0]
            met += 1
    assert met == 10


def test_the_origin_of_each_pair_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *questions(2),
        row(sample("a", 1), sample("b", 1), number=2),
        row(sample("c", 0), sample("d", 0.5), number=3),
    ]
    rollouts, prefix = stored(tmp_path / "rollouts", *rows), tmp_path / "pairs"
    assert main(["data", "pairs", str(rollouts), "--output", str(prefix)]) == 0
    assert "3 pairs of 4 queries" in (out := capsys.readouterr().out) and "1 query without a pair" in out
    kept = read_lines(tmp_path / "pairs.pairs.jsonl")
    assert [one["query"] for one in kept] == ["q0", "q1", "q3"]
    assert kept[2] == {
        "query": "q3", "chosen": 1, "rejected": 0, "chosen_reward": 0.5, "rejected_reward": 0, "rejected_truncated": False,
    }  # fmt: skip
    # The same again does nothing; other rules need --overwrite; a lost file is made again.
    files = {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*")}
    assert main(["data", "pairs", str(rollouts), "--output", str(prefix)]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert main(["data", "pairs", str(rollouts), "--output", str(prefix), "--rule", "all"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "pairs.pairs.jsonl").unlink()
    assert main(["data", "pairs", str(rollouts), "--output", str(prefix)]) == 0
    again = {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*") if path.suffix != ".json"}
    assert again.items() <= files.items() and "pairs.pairs.jsonl" in again
    assert (
        main(["data", "pairs", str(rollouts), "--output", str(prefix), "--rule", "all", "--overwrite", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]["pairs"] == 3


def test_rollouts_that_give_no_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollouts = stored(tmp_path / "rollouts", row(sample("a", 1), sample("A", 1)), row(sample("b", 1), number=1))
    assert main(["data", "pairs", str(rollouts), "--output", str(tmp_path / "p")]) == 2
    assert (
        "gives no pair of 2 queries: no finished answer has a higher reward than another answer to its query (left out: 1 "
        "answer nearly equal to another with the same reward). Sample more"
    ) in capsys.readouterr().err
    assert not list(tmp_path.glob("p.*"))
    rollouts = stored(tmp_path / "long", *questions(2))
    assert main(["data", "pairs", str(rollouts), "--output", str(tmp_path / "p"), "--length", "10"]) == 2
    assert "2 pairs longer than --length" in capsys.readouterr().err
    # Rewards that differ make no pair if the better answers are truncated, or if all of them pass.
    rollouts = stored(tmp_path / "cut", row(sample("a", 3, truncated=True), sample("b", 2)))
    base = ["data", "pairs", str(rollouts), "--output", str(tmp_path / "p"), "--truncated", "rejected"]
    assert main(base) == 2
    assert "gives no pair of 1 query: no finished answer has a higher reward" in capsys.readouterr().err
    assert main([*base, "--rule", "pass-fail"]) == 2
    assert "(a reward of at least 1) and one that fails. Sample more" in capsys.readouterr().err
    with pytest.raises(UserError, match="give best-worst"):
        PairRules(rule="best")  # type: ignore[arg-type]
