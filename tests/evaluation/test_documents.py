"""Question answering over documents of small files in the forms of SQuAD and HotpotQA."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.errors import UserError
from qwen_moe.evaluation.plan import Item
from qwen_moe.evaluation.scoring import clean
from qwen_moe.evaluation.tasks import documents
from qwen_moe.evaluation.tasks.haystack import read_essay
from qwen_moe.evaluation.tasks.ruler import ruler_tasks
from tests.evaluation.solver import Solver, solve
from tests.evaluation.test_tasks import evaluation

COLORS = {"Ada": "red", "Ben": "blue", "Cleo": "green", "Dan": "black", "Eve": "white", "Fay": "pink"}


def fact(name: str) -> str:
    return f"The color of {name} is {COLORS[name]}. " + "It was always so. " * 12


def squad(path: Path) -> Path:
    def paragraph(name: str) -> dict[str, Any]:
        asked = {"question": f"What is the color of {name}?", "answers": [{"text": "no"}, {"text": COLORS[name]}]}
        without = {"question": "Why?", "answers": [], "is_impossible": True}
        return {"context": fact(name), "qas": [without, asked | {"is_impossible": False}]}

    articles = [
        {"paragraphs": [paragraph(name) for name in names]} for names in (("Ada", "Ben"), ("Cleo", "Dan", "Eve"))
    ]
    path.write_text(json.dumps({"data": articles}))
    return path


def hotpot(path: Path) -> Path:
    rows = [
        {
            "question": f"What is the color of {a}?",
            "answer": COLORS[a],
            "context": [[a, [fact(a), "x"]], [b, [fact(b)]]],
        }
        for a, b in (("Ada", "Ben"), ("Cleo", "Dan"), ("Eve", "Fay"))
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("length", [500, 700, 3000])
def test_questions_over_documents(length: int, tokenizer: Any, tmp_path: Path) -> None:
    """With few documents, some and all of them several times; the document with the answer is always there."""
    solver = Solver(tokenizer)
    files: dict[str, Path | None] = {"qa_1": squad(tmp_path / "s.json"), "qa_2": hotpot(tmp_path / "h.json")}
    asked = evaluation(ruler_tasks(("qa_1", "qa_2"), read_essay(None), files, 3), (length,), samples=3)
    for item in asked.items():
        tokens, answers = asked.prompt(item, solver.encode)
        text = solver.decode(tokens)
        completion = clean(solver.decode(solver.encode(solve(text))))
        assert asked.tasks[item.task].score(completion, answers) == 1 and completion == answers[-1]
        numbers = [int(number) for number in re.findall(r"^Document (\d+):$", text, re.M)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(tokens) + 32 <= length
        assert len(numbers) >= (2 if item.task == "qa_2" else 1)
    assert len(numbers) > 6 or length < 3000


def test_documents_of_the_same_article_come_first(tokenizer: Any, tmp_path: Path) -> None:
    """SQuAD's distractors, as in the original: the same article before others."""
    collection = documents.read_squad(squad(tmp_path / "s.json"))
    asked = evaluation({"qa_1": documents.documents_task("qa_1", collection)}, (999,), samples=5)
    draft = asked.draft(Item("qa_1", 999, None, 0), Solver(tokenizer).encode)
    assert "of Ada is" in draft.text(1) and "of Ben is" in draft.text(2)
    assert {name for name in COLORS if f"of {name} is" in draft.text(5)} == {"Ada", "Ben", "Cleo", "Dan", "Eve"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}', '{"data": []}']
)
def test_files_without_questions(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    for read, option in ((documents.read_squad, "--squad"), (documents.read_hotpot, "--hotpot")):
        with pytest.raises(UserError, match=rf"{option} .*bad.json does not hold questions of that data set"):
            read(tmp_path / "bad.json")
        with pytest.raises(UserError, match=rf"{option} .*none.json does not exist"):
            read(tmp_path / "none.json")


def test_more_samples_than_questions(tmp_path: Path) -> None:
    path = hotpot(tmp_path / "h.json")
    with pytest.raises(UserError, match="--samples 4 is more than the 3 questions of"):
        ruler_tasks(["qa_2"], read_essay(None), {"qa_1": None, "qa_2": path}, 4)
