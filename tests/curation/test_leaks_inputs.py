"""Bad input is named with file and line, counted, and left out only if asked to; words are the same in any spelling."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.data import words as tokens
from qwen_moe.data.words import words
from tests.curation.leaks_data import decontaminate, read_jsonl, write_jsonl

TEST = " ".join(f"word{n}" for n in range(20))
GOOD = json.dumps({"text": "nothing of it", "id": "good"}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "docs.jsonl", [{"text": TEST}, {"text": "clean"}])
    write_jsonl(tmp_path / "tests.jsonl", [{"text": TEST}])
    return tmp_path


def error(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, **files: str) -> str:
    """The message of a command that is refused, before it has written anything."""
    capsys.readouterr()
    assert decontaminate(folder, *options, **files) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and message.count("error: ") == 1
    return message.split("error: ")[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{broken", "is not JSON"),
        (b"[1]", "is of type list"),
        (b'{"title": "x"}', "neither 'text' nor messages or a prompt"),
        (b'{"text": 3}', "'text' is int"),
        (b'{"text": "a", "text": "b"}', "'text' is given twice"),
        (b'{"text": "caf\xe9"}', "byte 13 of the line (0xe9) is not UTF-8"),
        ('{"text": "wide"}'.encode("utf-16-le"), "NUL byte"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "a\\u0000"}', "has a NUL"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_left_out_if_asked_to(
    folder: Path, line: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "docs.jsonl").write_bytes(GOOD + b"\n" + line + b"\n\n" + GOOD + b"\n")
    message = error(capsys, folder)
    assert f"{folder / 'docs.jsonl'}, line 2" in message and said in message and "--on-bad-line skip" in message
    assert not (folder / "clean" / "decontaminated.json").exists()
    assert decontaminate(folder, "--on-bad-line", "skip") == 0  # the same output, without --overwrite
    assert len(read_jsonl(folder / "clean" / "clean-00000.jsonl")) == 2
    assert f"1 row that cannot be read ({folder / 'docs.jsonl'}, line 2)" in capsys.readouterr().err
    assert json.loads((folder / "clean" / "leaks.json").read_text())["counts"]["bad"] == 1


def test_a_text_file_in_another_encoding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_bytes("café".encode("latin-1"))
    (folder / "texts" / "b.txt").write_text("good")
    assert f"{folder / 'texts' / 'a.txt'}: byte 3 (0xe9) is not UTF-8" in error(capsys, folder, inputs="texts")
    assert decontaminate(folder, "--on-bad-line", "skip", inputs="texts") == 0
    assert [row["text"] for row in read_jsonl(folder / "clean" / "clean-00000.jsonl")] == ["good"]
    assert f"1 row that cannot be read ({folder / 'texts' / 'a.txt'})" in capsys.readouterr().err
    counts = json.loads((folder / "clean" / "leaks.json").read_text())["counts"]
    assert counts == {"rows": 2, "kept": 1, "dropped": 0, "bad": 1, "by_chance": 0}


def test_short_tests_are_counted_named_and_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(
        folder / "tests.jsonl", [{"text": TEST}, {"text": "What is 2 + 2?"}, {"text": " ".join(TEST.split()[:12])}]
    )
    message = error(capsys, folder)
    assert message.startswith("2 of 3 tests are too short for the rule, which needs 13 tokens")
    assert f"{folder / 'tests.jsonl'}, line 2" in message and "line 3" in message and "--on-short skip" in message
    assert not (folder / "clean").exists()
    assert decontaminate(folder, "--on-short", "skip") == 0
    assert "tests left out: 2 tests of fewer than 13 tokens" in capsys.readouterr().err
    assert "2 tests of fewer than 13 tokens" in (folder / "clean" / "leaks.html").read_text()
    record = json.loads((folder / "clean" / "decontaminated.json").read_text())
    assert len(record["tests"]["hashes"]) == 1


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "two words"}\n'])
def test_an_empty_test_set_is_refused(folder: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tests.jsonl").write_text(content)
    message = error(capsys, folder, "--on-short", "skip")
    assert "empty" in message and "tests.jsonl" in message
    assert not (folder / "clean").exists()


def test_a_broken_line_of_a_test_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "tests.jsonl").open("a") as file:
        file.write('{"question": "x"}\n')
    assert f"test set: {folder / 'tests.jsonl'}, line 2 has neither 'text'" in error(capsys, folder)
    assert "no 'question'; name the keys with --test-key" in error(capsys, folder, "--test-key", "question")
    assert decontaminate(folder, "--on-bad-line", "skip") == 0


@pytest.mark.parametrize(
    ("options", "files", "said"),
    [
        ((), {"inputs": "missing.jsonl"}, "missing.jsonl does not exist"),
        ((), {"against": "missing.jsonl"}, "test set: input"),
        (("--report", "page.pdf"), {}, "expected a name that ends in .html"),
        (("--text-key", ""), {}, "text_key = ''"),
        (("--text-key", "\udcff"), {}, "unable to parse raw data as a unicode string"),
        (("--test-key", "a,,b"), {}, "has an empty name"),
        (("--tokenizer", "missing"), {}, "--tokenizer missing is no folder"),
        (("--workers", "5000"), {}, "expected a whole number"),
        ((), {"inputs": "."}, "would be read as input"),
    ],
)
def test_what_cannot_be(
    folder: Path, options: tuple[str, ...], files: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error(capsys, folder, *options, **files)
    assert not (folder / "clean").exists()


def test_a_folder_with_other_files_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "clean").mkdir()
    (folder / "clean" / "notes.txt").write_text("mine")
    assert "has other files: give a new or empty folder" in error(capsys, folder, "--overwrite")
    assert [path.name for path in (folder / "clean").iterdir()] == ["notes.txt"]


def test_parquet_without_the_column_and_damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a", "b"]}), folder / "docs.parquet")
    message = error(capsys, folder, inputs="docs.parquet")
    assert f"{folder / 'docs.parquet'}, line 1 has neither 'text'" in message and "found: body" in message
    assert decontaminate(folder, "--text-key", "body", "--test-key", "text", inputs="docs.parquet") == 0
    (folder / "docs.parquet").write_bytes(b"PAR1 and no more")
    assert "is not a Parquet file that can be read" in error(capsys, folder, "--overwrite", inputs="docs.parquet")


def test_bytes_of_parquet_are_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [b"some bytes"]}), folder / "docs.parquet")
    assert "docs.parquet, row 1: column 'text' holds bytes, expected text" in error(
        capsys, folder, inputs="docs.parquet"
    )
    pq.write_table(pa.table({"text": [TEST], "answer": [TEST.encode()]}), folder / "tests.parquet")
    message = error(capsys, folder, "--test-key", "text,answer", against="tests.parquet")
    assert "tests.parquet, row 1: column 'answer' holds bytes, expected text" in message


def test_files_without_a_row_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "docs.jsonl").write_text("\n \n")
    assert "there is no row in" in error(capsys, folder)


def test_a_text_whose_name_is_not_utf8(folder: Path) -> None:
    texts = folder / "texts"
    texts.mkdir()
    try:
        (texts / "caf\udce9.txt").write_text(TEST)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert decontaminate(folder, inputs="texts") == 0
    (row,) = read_jsonl(folder / "clean" / "dropped" / "dropped-00000.jsonl")
    assert row["id"] == str(texts / "caf\udce9.txt")


def test_a_dropped_row_with_half_a_character_is_utf8(folder: Path) -> None:
    (folder / "docs.jsonl").write_text(json.dumps({"text": TEST, "title": "\ud800"}) + "\n")
    assert decontaminate(folder) == 0
    (row,) = read_jsonl(folder / "clean" / "dropped" / "dropped-00000.jsonl")
    assert row["title"] == "\ud800"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The  CAT,\n sat_on: the-mat!", "the cat sat on the mat"),
        ("don’t “stop”", "don't stop"),
        ("Ｆｕｌｌ ﬁne Straße", "full fine strasse"),
        ("cafe\u0301 CAFÉ", "café café"),
        ("我是学生。I am", "我 是 学 生 i am"),
        ("हिन्दी में", "हिन्दी में"),
        ("x² = 4", "x2 4"),
    ],
)
def test_words_of_normalized_text(text: str, same: str) -> None:
    assert words(text) == words(same) == (same.split() if "'" not in same else ["don", "t", "stop"])


def test_both_ways_to_words_agree_on_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(map(chr, range(1, 128))) * 2 + " Mixed_CASE 12,000.5 end"
    slow = words(text + "é")  # é makes it take the way of other text
    assert slow[:-1] == words(text)[:-1] and slow[-1] == "endé" and words(text)[-1] == "end"
    assert tokens.normalized(text) == " ".join(words(text))


def test_rows_keep_their_metadata(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": TEST, "metadata": {"domain": "web"}}, {"text": TEST, "metadata": "odd"}]
    write_jsonl(tmp_path / "docs.jsonl", rows)
    write_jsonl(tmp_path / "tests.jsonl", [{"text": TEST}])
    assert decontaminate(tmp_path) == 0
    found = [row["metadata"] for row in read_jsonl(tmp_path / "clean" / "dropped" / "dropped-00000.jsonl")]
    assert found[0]["domain"] == "web" and found[1]["metadata"] == "odd"
    assert all(one["filter_reason"] == "leak" for one in found)
