"""Reading documents: every kind of file, and a message for every kind of damage."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path

import pytest
import zstandard

from qwen_moe.data.corpus import ReadCounts, Reading, read_documents
from qwen_moe.data.sources import PYTHON_STDLIB, Corpus, find_corpus
from qwen_moe.errors import UserError

TEXTS = ["first document\n", "zweites Dokument: äöü €", "第三"]
JSONL = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)) + "\n"


def found(*inputs: Path | str) -> Corpus:
    return find_corpus([str(i) for i in inputs])


def read(*inputs: Path | str, **options: str) -> tuple[list[str], ReadCounts]:
    counts = ReadCounts()
    corpus = found(*inputs)
    reading = Reading(**options)  # type: ignore[arg-type]
    texts = [d for s in corpus.sources for d in read_documents(s, counts, reading)]
    assert counts.bytes == corpus.bytes
    assert counts.digests == [hashlib.sha256(s.path.read_bytes()).hexdigest() for s in corpus.sources]
    return texts, counts


def documents(*inputs: Path | str, **options: str) -> list[str]:
    return read(*inputs, **options)[0]


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
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(JSONL.encode()))
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(JSONL.encode()[:50]) + bz2.compress(JSONL.encode()[50:]))
    (tmp_path / "a.txt").write_text("one file, one document")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.md.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("")
    assert documents(tmp_path) == ["one file, one document", *TEXTS * 5, "packed"]


def test_the_standard_library_is_real_text_in_a_fixed_shuffled_order() -> None:
    sources = found(PYTHON_STDLIB).sources
    assert sum(s.bytes for s in sources) > 10_000_000
    assert sources == found(PYTHON_STDLIB).sources
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
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', ["line 1", "'text' is given twice"]),
        ("a.jsonl", b'{"text": "a", "metadata": {"id": 1, "id": 2}}\n', ["line 1", "'id' is given twice"]),
        ("a.txt", b"good \xff bad", ["a.txt", "byte 5", "0xff", "--on-bad-utf8"]),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xfe"}\n', ["line 2", "byte 25", "0xfe"]),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-10], ["a.txt.gz", "damaged or truncated"]),
        ("a.jsonl.gz", b"this is not gzip", ["a.jsonl.gz", "damaged or truncated"]),
        ("a.txt.zst", b"nor is this zstandard", ["a.txt.zst", "damaged or truncated"]),
        ("a.parquet", b"x", ["a.parquet", "ending", ".jsonl"]),
        ("a.json", b"{}", ["a.json", "ending", ".jsonl"]),
        ("a.txt", b"", ["empty"]),
        ("a.txt", b"of a binary\0 file", ["a.txt", "byte 11", "NUL", "--on-bad-utf8"]),
        ("a.txt", "utf-16, no mark".encode("utf-16-le"), ["a.txt", "byte 1 ", "NUL"]),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\\ud83d no"}\n', ["line 2", r"\ud83d", "--on-bad-utf8"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "deeply"]),
    ],
)
def test_damage_names_the_file_and_the_place(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    text = refused(tmp_path / name)
    assert all(part in text for part in parts), text


def test_bad_utf8_can_be_skipped_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "t\xffo"}\n{"text": "three"}\n')
    texts, counts = read(tmp_path / "a.jsonl", on_bad_utf8="skip")
    assert texts == ["one", "three"]
    assert counts.skipped == 1 and "line 2" in str(counts.left_out)
    assert documents(tmp_path / "a.jsonl", on_bad_utf8="replace") == ["one", "t\ufffdo", "three"]


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "contains no text" in refused(tmp_path)


def test_another_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    assert documents(tmp_path / "a.jsonl", text_key="content") == ["x"]


def test_a_lone_surrogate_is_not_unicode_and_a_pair_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r"""{"text": "pair \ud83d\ude00"}
{"text": "lone \ude00!"}
""")
    assert documents(path, on_bad_utf8="replace") == ["pair \U0001f600", "lone \ufffd!"]
    texts, counts = read(path, on_bad_utf8="skip")
    assert texts == ["pair \U0001f600"]
    assert str(counts.left_out) == f"1 not decodable ({path}, line 2)"


def test_nul_bytes_are_replaced_or_their_text_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"of a\0file")
    (tmp_path / "b.txt").write_bytes(b"text")
    assert documents(tmp_path, on_bad_utf8="replace") == ["of a\ufffdfile", "text"]
    assert documents(tmp_path, on_bad_utf8="skip") == ["text"]


def test_a_nul_that_json_spells_is_refused_as_a_nul_byte_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "c"}\n')
    assert r"line 1: \u0000 is a NUL, which no text has" in refused(tmp_path / "a.jsonl")
    assert documents(tmp_path / "a.jsonl", on_bad_utf8="replace") == ["a\ufffdb", "c"]
    assert documents(tmp_path / "a.jsonl", on_bad_utf8="skip") == ["c"]


def test_malformed_lines_can_be_left_out_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.data.corpus.LONGEST_DOCUMENT", 100)
    lines = ['{"text": "one"}', '{"text": ', '{"body": 1}', "[1]", '{"text": null}', f'{{"text": "{"x" * 200}"}}', "5"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines, "", '{"text": "  "}', '{"text": "last"}']))
    texts, counts = read(path, on_bad_line="skip")
    assert texts == ["one", "last"]
    assert counts.left_out.counts == {"malformed lines": 6, "empty": 1} and counts.skipped == 6
    assert f"6 malformed lines ({path}, line 2, {path}, line 3, {path}, line 4, ...)" in str(counts.left_out)
    for number, line in enumerate(lines[1:]):
        path.write_text(f'{{"text": "one"}}\n{line}\n')
        text = refused(path)
        assert f"{path}, line 2" in text and "--on-bad-line skip" in text, (number, text)
    (tmp_path / "b.txt").write_text("x" * 101)
    assert "b.txt is a document of more than 100 bytes" in refused(tmp_path / "b.txt")


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
    assert documents(tmp_path) == ["text", "line"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext\xff")
    assert "byte 7 (0xff)" in refused(tmp_path / "a.txt")


PACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("frames", [1, 2])
def test_a_packed_file_that_ends_too_early_is_refused(tmp_path: Path, ending: str, frames: int) -> None:
    """Also in its second frame, and where what is left of it is a whole number of lines."""
    rows = [json.dumps({"text": f"{n} {hashlib.sha256(bytes([n])).hexdigest()}"}) + "\n" for n in range(200)]
    half = PACK[ending]("".join(rows[:100]).encode()), PACK[ending]("".join(rows[100:]).encode())
    whole = half[0] + half[1] if frames == 2 else half[0]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(whole)
    assert len(documents(path)) == 100 * frames
    start = len(half[0]) if frames == 2 else 0
    for cut in {start + 1, start + 20, (start + len(whole)) // 2, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        assert "damaged or truncated" in refused(path), cut
    path.write_bytes(b"")
    (tmp_path / "b.txt").write_text("so that the corpus is not empty")
    assert "it is empty" in refused(path, tmp_path / "b.txt")


@pytest.mark.parametrize("ending", PACK)
def test_a_damaged_packed_file_is_refused_or_unharmed(tmp_path: Path, ending: str) -> None:
    content = "".join(hashlib.sha256(bytes([n])).hexdigest() for n in range(100)).encode()
    packed = (
        zstandard.ZstdCompressor(write_checksum=True).compress(content) if ending == ".zst" else PACK[ending](content)
    )
    path = tmp_path / f"a.txt{ending}"
    refusals = 0
    for position in range(0, len(packed), max(1, len(packed) // 150)):
        damaged = bytearray(packed)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert documents(path) == [content.decode()]
        except UserError as error:
            refusals += str(error).count("damaged or truncated")
    assert refusals > 100


def test_frames_that_hold_nothing_and_zeros_at_the_end(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    (tmp_path / "a.txt.zst").write_bytes(
        zstandard.compress(b"one ") + skippable + zstandard.compress(b"two") + skippable
    )
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three") + bytes(40))
    assert documents(tmp_path) == ["one two", "three"]


def test_what_a_folder_scan_leaves_out_is_counted_and_named(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / ".ipynb_checkpoints", corpus / "sub", elsewhere):
        folder.mkdir(parents=True)
    for path in (
        "a.txt",
        "._a.txt",
        ".ipynb_checkpoints/a.txt",
        "b.json",
        "c.parquet",
        "d.tar.gz",
        "README",
        "sub/e.md",
    ):
        (corpus / path).write_text(path)
    (elsewhere / "linked.txt").write_text("linked")
    (corpus / "folder").symlink_to(elsewhere)
    (corpus / "loop").symlink_to(corpus)
    (corpus / "again.txt").symlink_to("sub/e.md")
    (corpus / "broken.txt").symlink_to("nowhere")
    os.mkfifo(corpus / "pipe.txt")
    assert documents(corpus) == ["a.txt", "linked", "sub/e.md"]
    left_out = found(corpus).left_out
    assert left_out.counts == {
        "hidden": 2,
        "ending in .json": 1,
        "ending in .parquet": 1,
        "ending in .tar.gz": 1,
        "without an ending": 1,
        "link to nothing": 1,
        "no regular file": 1,
        "met before under another name": 2,
    }
    assert f"2 hidden ({corpus}/._a.txt, {corpus}/.ipynb_checkpoints/)" in str(left_out)
    assert "3 files" in str(found(corpus)) and f"{corpus}/c.parquet" in str(found(corpus))


def test_no_document_is_read_twice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once")
    assert documents(tmp_path, tmp_path / "a.txt") == ["once"]
    (tmp_path / "b.txt").write_text("too")
    assert documents(tmp_path / "a.txt", tmp_path) == ["once", "too"]
    assert "twice" in refused(tmp_path, tmp_path)
    assert "empty" in refused("")
