"""`pydoc-questions:COUNT`: a test set of help()'s paragraphs, and what is refused."""

import json
from pydoc_data.topics import topics

import pytest

from qwen_moe.data.corpus import ReadCounts, read_documents
from qwen_moe.data.pydoc_questions import pydoc_questions
from qwen_moe.data.sources import find_corpus
from qwen_moe.errors import UserError


def test_each_question_is_a_paragraph_of_another_topic() -> None:
    rows = pydoc_questions("pydoc-questions:8")
    assert len({row["topic"] for row in rows}) == len({row["text"] for row in rows}) == 8
    for row in rows:
        assert row["text"] in " ".join(topics[row["topic"]].split())
        assert row["text"] == f"{row['question']} {row['answer']}" and len(row["answer"].split(" ")) == 8
        assert len(row["text"].split()) > 30


def test_more_questions_begin_with_the_same_ones() -> None:
    assert pydoc_questions("pydoc-questions:20")[:8] == pydoc_questions("pydoc-questions:8")


def test_they_are_read_as_json_lines() -> None:
    (source,) = find_corpus(["pydoc-questions:3"]).sources
    counts = ReadCounts()
    assert list(read_documents(source, counts)) == [row["text"] for row in pydoc_questions("pydoc-questions:3")]
    assert source.has_rows and counts.bytes == source.bytes == len(source.open().read())
    assert [json.loads(line)["id"] for line in source.open()] == [
        row["id"] for row in pydoc_questions("pydoc-questions:3")
    ]


@pytest.mark.parametrize("count", ["", "0", "-3", "8:2", "many", "٣"])
def test_other_names_are_refused(count: str) -> None:
    with pytest.raises(UserError, match="is not of the form pydoc-questions:COUNT, as in pydoc-questions:8"):
        find_corpus([f"pydoc-questions:{count}"])


def test_more_than_there_are() -> None:
    with pytest.raises(UserError, match=r"gives only \d+ questions: ask for fewer"):
        find_corpus(["pydoc-questions:1000000"])
