"""Reading documents: every kind of file, and a message for every kind of damage."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from qwen_moe.data.corpus import PYTHON_STDLIB, ReadCounts, find_sources, read_documents
from qwen_moe.errors import UserError

TEXTS = ["first document\n", "zweites Dokument: äöü €", "第三"]
JSONL = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)) + "\n"


def documents(*inputs: Path | str, **options: str) -> list[str]:
    counts = ReadCounts()
    found = [d for s in find_sources([str(i) for i in inputs]) for d in read_documents(s, counts, **options)]  # type: ignore[arg-type]
    assert counts.bytes == sum(s.bytes for s in find_sources([str(i) for i in inputs]))
    return found


def refused(*inputs: Path | str, **options: str) -> str:
    with pytest.raises(UserError) as error:
        documents(*inputs, **options)
    return str(error.value)


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(JSONL)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(JSONL.encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(
        zstandard.compress(JSONL.encode()[:50]) + zstandard.compress(JSONL.encode()[50:])
    )
    (tmp_path / "a.txt").write_text("one file, one document")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.md.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("")
    assert documents(tmp_path) == ["one file, one document", *TEXTS, *TEXTS, *TEXTS, "packed"]


def test_the_standard_library_is_real_text_in_a_fixed_shuffled_order() -> None:
    sources = find_sources([PYTHON_STDLIB])
    assert sum(s.bytes for s in sources) > 10_000_000
    assert sources == find_sources([PYTHON_STDLIB])
    names = [s.path.name for s in sources]
    assert names != sorted(names) and "argparse.py" in names
    assert not any("site-packages" in s.path.parts for s in sources)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"body": "x"}\n', ["line 1", "'text'", "body", "--text-key"]),
        ("a.jsonl", b'{"text": 5}\n', ["line 1", "int"]),
        ("a.jsonl", b'["text"]\n', ["line 1", "list"]),
        ("a.txt", b"good \xff bad", ["a.txt", "byte 5", "0xff", "--on-bad-utf8"]),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xfe"}\n', ["line 2", "byte 25", "0xfe"]),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-10], ["a.txt.gz", "damaged or cut off"]),
        ("a.jsonl.gz", b"this is not gzip", ["a.jsonl.gz", "damaged or cut off"]),
        ("a.txt.zst", b"nor is this zstandard", ["a.txt.zst", "damaged or cut off"]),
        ("a.parquet", b"x", ["a.parquet", "ending", ".jsonl"]),
        ("a.txt", b"", ["empty"]),
    ],
)
def test_damage_names_the_file_and_the_place(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    text = refused(tmp_path / name)
    assert all(part in text for part in parts), text


def test_bad_utf8_can_be_skipped_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "t\xffo"}\n{"text": "three"}\n')
    counts = ReadCounts()
    (source,) = find_sources([str(tmp_path / "a.jsonl")])
    assert list(read_documents(source, counts, on_bad_utf8="skip")) == ["one", "three"]
    assert len(counts.skipped) == 1 and "line 2" in counts.skipped[0]
    assert documents(tmp_path / "a.jsonl", on_bad_utf8="replace") == ["one", "t\ufffdo", "three"]


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "holds no text" in refused(tmp_path)


def test_another_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    assert documents(tmp_path / "a.jsonl", text_key="content") == ["x"]
