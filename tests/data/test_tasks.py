"""Generated tasks: exact answers, and held-out questions that training never has."""

import json

import pytest

from qwen_moe.cli import main
from qwen_moe.data.sources import find_corpus
from qwen_moe.data.tasks import KINDS, tasks, tasks_bytes
from qwen_moe.errors import UserError

RIGHT = {
    "addition": lambda q: str(eval(q.rstrip("="))),
    "subtraction": lambda q: str(eval(q.rstrip("="))),
    "reverse": lambda q: q.removeprefix("reverse ")[::-1],
    "sort": lambda q: "".join(sorted(q.removeprefix("sort "))),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_answers_are_right_and_held_out_questions_are_new(kind: str) -> None:
    trained, held_out = tasks(f"tasks:{kind}:4000"), tasks(f"tasks:{kind}:900:heldout")
    for row in trained + held_out:
        assert row["answer"] == row["completion"] == RIGHT[kind](row["prompt"])
    questions = {row["prompt"] for row in held_out}
    assert len(questions) == 900 and questions.isdisjoint(row["prompt"] for row in trained)


def test_later_tasks_are_different_from_the_first_and_from_those_held_out() -> None:
    first, later = tasks("tasks:addition:4000"), tasks("tasks:addition:3000:after:4000")
    questions = {row["prompt"] for row in later}
    assert len(questions) == 3000 and questions.isdisjoint(row["prompt"] for row in first)
    assert questions.isdisjoint(row["prompt"] for row in tasks("tasks:addition:1000:heldout"))
    assert {row["id"] for row in later}.isdisjoint(row["id"] for row in first)
    assert all(row["answer"] == RIGHT["addition"](row["prompt"]) for row in later)


def test_a_thousand_sums_are_held_out_and_the_bytes_are_always_the_same() -> None:
    assert len(tasks("tasks:addition:1000:heldout")) == 1000
    assert tasks_bytes("tasks:mixed:50") == tasks_bytes.__wrapped__("tasks:mixed:50")
    assert {row["kind"] for row in tasks("tasks:mixed:50")} == {"mixed"}
    assert [json.loads(line) for line in tasks_bytes("tasks:sort:3").splitlines()] == tasks("tasks:sort:3")
    (source,) = find_corpus(["tasks:sort:3"]).sources
    assert source.has_lines and source.bytes == len(tasks_bytes("tasks:sort:3"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tasks:addition", "not of the form"),
        ("tasks:addition:0", "give 1 to"),
        ("tasks:addition:9999999999999", "give 1 to"),
        ("tasks:addition:5:test", "not of the form"),
        ("tasks:cooking:5", f"no kind 'cooking' of tasks: give one of {', '.join(KINDS)}"),
        ("tasks:addition:9000:heldout", "only 1,"),
        ("tasks:addition:9000:after:4000", "tasks of this kind beside the first 4,000"),
        ("tasks:addition:5:after", "not of the form"),
        ("tasks:addition:5:after:0", "give 1 to"),
        ("tasks:addition:5:heldout:5", "not of the form"),
    ],
)
def test_what_cannot_be_made_is_said(name: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        tasks(name)


def test_tasks_can_be_prepared_as_text_and_as_conversations(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    text = ["data", "prepare", "--input", "tasks:sort:40", "--output", str(tmp_path / "text"), "--train-tokenizer"]
    assert main([*text, "--vocab-size", "290"]) == 0
    tokenizer = str(tmp_path / "text-tokenizer")
    chat = ["data", "chat", "--input", "tasks:sort:40", "--output", str(tmp_path / "chat"), "--tokenizer", tokenizer]
    assert main([*chat, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]["conversations"] == 40
