"""Right answers and examples of tasks, checked before a model is asked."""

from types import SimpleNamespace
from typing import Any

import pytest

from qwen_moe.errors import UserError
from qwen_moe.evaluation.harness.task_checks import check_choices, check_examples


def task(*documents: tuple[list[str], Any], **config: Any) -> Any:
    """A task of documents with their choices and right answers."""
    settings = {"output_type": "multiple_choice", "process_results": None} | config
    return SimpleNamespace(
        config=SimpleNamespace(**settings),
        eval_docs=list(documents),
        doc_to_choice=lambda document: document[0],
        doc_to_target=lambda document: document[1],
    )


GOOD = (["a", "b"], 1)


@pytest.mark.parametrize(
    ("answer", "there"),
    [
        (0, True),
        (1, True),
        (2, False),
        (-1, False),
        ("b", True),
        ("c", False),
        ("1", False),
        ([0, 5], True),
        ([2], False),
        ([], False),
    ],
)
def test_answers_that_are_there(answer: Any, there: bool) -> None:
    said = check_choices("t", task(GOOD, (["a", "b"], answer)))
    assert (said == "") == there
    assert (
        there
        or f"in 1 of 2 documents of t the right answer is none of the choices (document 2: {answer!r} of 2" in said
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            (["a", "b"], None),
            r"the right answer of document 2 of t is None, expected the number of a choice \(0 to 1\)",
        ),
        ((["a", "b"], 1.0), "the right answer of document 2 of t is 1.0, expected"),
        ((["a", "b"], ["b"]), "the right answer of document 2 of t is 'b', expected"),
        (([], 0), "document 2 of t has no choices"),
    ],
)
def test_documents_that_the_harness_cannot_score(document: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_choices("t", task(GOOD, document))
    assert check_choices("t", task(GOOD, document), 1) == check_choices("t", task(GOOD, document), 0.5) == ""
    assert check_choices("t", task(GOOD, document, output_type="generate_until")) == ""
    assert check_choices("t", task(GOOD, document, process_results=print)) == ""


def with_examples(count: int, documents: int, split: str | None, **splits: str) -> Any:
    names = ("training_split", "validation_split", "test_split")
    config = SimpleNamespace(num_fewshot=count, **{name: splits.get(name) for name in names})
    given = SimpleNamespace(split=split, samples=None, sampler="default", fewshot_indices=None)
    return SimpleNamespace(config=config, fewshot_cfg=given, fewshot_docs=lambda: range(documents))


@pytest.mark.parametrize(
    ("split", "splits", "fix"),
    [
        (None, {"test_split": "test"}, "set fewshot_split: test"),
        ("test", {"test_split": "test"}, ""),
        (None, {"test_split": "test", "training_split": "train"}, ""),
        ("dev", {"test_split": "test"}, ""),
        (None, {"validation_split": "validation"}, ""),
        ("validation", {"validation_split": "validation"}, "leave fewshot_split out"),
    ],
)
def test_examples_that_may_be_the_asked_document(split: str | None, splits: dict[str, str], fix: str) -> None:
    said = check_examples("t", with_examples(2, 9, split, **splits))
    assert (fix in said and "may hold its own answer" in said) if fix else said == ""
    assert check_examples("t", with_examples(0, 9, split, **splits)) == ""


def test_too_few_documents_for_the_examples() -> None:
    with pytest.raises(UserError, match="t: 3 examples in each prompt cannot be drawn from 2 documents"):
        check_examples("t", with_examples(3, 2, None, test_split="test"))
    with pytest.raises(UserError, match="cannot be drawn from 3 documents"):  # one of them is asked
        check_examples("t", with_examples(3, 3, "test", test_split="test"))
