"""The step of a datatrove pipeline drops what the command drops."""

import contextlib
import pickle
import random
from pathlib import Path

import pytest

from qwen_moe.curation.leaks.settings import LeakSettings
from qwen_moe.errors import UserError
from tests.curation.leaks_data import changed, draw, write_jsonl

pytest.importorskip("datatrove")

from datatrove.data import Document

from qwen_moe.curation.leaks.filter import LeakFilter


class Kept(contextlib.nullcontext[None]):
    """An exclusion writer that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.documents: list[Document] = []

    def __enter__(self) -> "Kept":  # type: ignore[override]
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        self.documents.append(document)


def test_documents_are_dropped_with_a_reason(tmp_path: Path) -> None:
    rng = random.Random(0)
    tests = [draw(rng, 30) for _ in range(3)]
    against = write_jsonl(tmp_path / "tests.jsonl", [{"text": " ".join(test)} for test in tests])
    writer = Kept()
    step = LeakFilter(LeakSettings(against=(str(against),)), writer)
    clean = [Document(text=" ".join(draw(rng, 80)), id=str(n)) for n in range(4)]
    leak = Document(text=" ".join(draw(rng, 40) + changed(rng, tests[1], 0.2)), id="leak")
    kept = list(step.run(iter([*clean, leak]), rank=0))
    assert [one.id for one in kept] == ["0", "1", "2", "3"]
    (dropped,) = writer.documents
    assert dropped.id == "leak" and dropped.metadata["filter_reason"] == "leak"
    assert dropped.metadata["leak"]["test_line"] == 2
    assert pickle.loads(pickle.dumps(step))._finder is None


def test_tests_are_checked_before_documents_come(tmp_path: Path) -> None:
    against = write_jsonl(tmp_path / "tests.jsonl", [{"text": "too short"}])
    with pytest.raises(UserError, match=r"tests\.jsonl, line 1.*--on-short skip"):
        LeakFilter(LeakSettings(against=(str(against),))).check()
