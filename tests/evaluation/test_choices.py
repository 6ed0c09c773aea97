"""Right answers of multiple-choice tasks, checked before a model is asked."""

from types import SimpleNamespace
from typing import Any

import pytest

from qwen_moe.errors import UserError
from qwen_moe.evaluation.harness.choices import check_choices


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
