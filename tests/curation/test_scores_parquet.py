"""`qwen-moe data score` on Parquet: as on JSON lines; columns that are missing or hold no text, damaged files."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.curation.scoring import document, read, score, write

SCORER = "tests.curation.test_scores_parquet:several"


def several(text: str, metadata: dict[str, Any]) -> dict[str, float]:
    return {"words": len(text.split()), "letters": float(len(text))}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parquet(path: Path, **columns: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def broken_text() -> Any:
    """Arrow's column of texts, of which the second is Latin-1."""
    import pyarrow

    return pyarrow.array([b"first water", b"caf\xe9", b"third paper"], pyarrow.binary()).cast(
        pyarrow.string(), safe=False
    )


def test_parquet_is_scored_as_json_lines_are(here: Path) -> None:
    rows = [document(n) for n in range(20, 31)]
    rows = [{"text": row["text"], "id": row["id"], "stars": n} for n, row in enumerate(rows)]
    write(here / "lines" / "a.jsonl", rows)
    parquet(here / "rows" / "a.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    for folder in ("rows", "lines"):
        (here / folder / "b.txt").write_text("alpha stone\n")
        assert score("--input", folder, "--scorer", SCORER, "--output", f"{folder}-out", "--batch-documents", 4) == 0
    found, expected = read(here / "rows-out"), read(here / "lines-out")
    assert len(found) == 12 and found[3]["metadata"]["stars"] == 3
    for one, other in zip(found, expected, strict=True):
        of_file = one["metadata"].pop("file_path"), other["metadata"].pop("file_path")
        assert of_file in {("rows/a.parquet", "lines/a.jsonl"), ("rows/b.txt", "lines/b.txt")}
        one["id"], other["id"] = one["id"].removeprefix("rows/"), other["id"].removeprefix("lines/")
        assert one == other
    assert json.loads((here / "rows-out" / "00000.json").read_text())["documents"] == 11  # the file of Parquet alone


def test_a_classifier_learns_from_parquet(here: Path) -> None:
    rows = [document(n, 20) for n in range(200)]
    label = ["wet" if row["text"].count("water") else "dry" for row in rows]
    parquet(here / "rows.parquet", body=[row["text"] for row in rows], label=label)
    options = ("--epochs", 1, "--buckets", 1024, "--hidden", 0, "--text-key", "body", "--target", "label")
    assert score("--input", "rows.parquet", "--train-classifier", "learned", *options) == 0
    assert sorted(json.loads((here / "learned" / "classifier.json").read_text())["names"]) == ["dry", "wet"]


def test_a_column_that_parquet_lacks_is_named_before_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet(here / "docs" / "z.parquet", body=["one", None, "three"], stars=[1, 2, 3])
    arguments = ("--input", "docs", "--scorer", SCORER)
    message = "docs/z.parquet has no column 'text' (found: body, stars): name the column with the text with --text-key"
    for wanted in (("--output", "out"), ("--train-classifier", "learned")):
        assert score(*(arguments[:2] if "--output" not in wanted else arguments), *wanted) == 2
        assert message in capsys.readouterr().err
    assert not (here / "out").exists()
    alone = ("--input", "docs/z.parquet", "--scorer", SCORER, "--output", "out")
    assert score(*alone, "--text-key", "stars") == 2
    assert "column 'stars' holds int64, expected text" in capsys.readouterr().err
    assert score(*alone, "--text-key", "body") == 2
    assert "docs/z.parquet, row 2: column 'body' has no text" in capsys.readouterr().err
    assert score(*alone, "--text-key", "body", "--on-bad-line", "skip") == 0
    assert [row["id"] for row in read(here / "out")] == ["docs/z.parquet, row 1", "docs/z.parquet, row 3"]
    assert "left out: 1 malformed line\n" in capsys.readouterr().out


def test_parquet_that_is_damaged_or_not_utf8(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet(here / "latin.parquet", text=broken_text(), note=broken_text())
    arguments = ("--input", "latin.parquet", "--scorer", SCORER, "--output", "out")
    assert score(*arguments) == 2
    assert "latin.parquet, row 2: byte 3 (0xe9) is not UTF-8" in capsys.readouterr().err
    assert score(*arguments, "--on-bad-utf8", "replace") == 2  # the folder was begun with another setting
    assert score(*arguments[:-1], "new", "--on-bad-utf8", "replace") == 0
    assert [row["text"] for row in read(here / "new")] == ["first water", "caf\ufffd", "third paper"]
    (here / "no.parquet").write_bytes(b"PAR1 and no more")
    assert score("--input", "no.parquet", *arguments[2:-1], "other") == 2
    assert "no.parquet is not a Parquet file" in capsys.readouterr().err


def test_texts_that_are_stored_once_each(here: Path) -> None:
    """A dictionary is how pandas writes a categorical column; views are another layout of text."""
    pa = pytest.importorskip("pyarrow")
    texts = ["alpha stone", "water river", "alpha stone"]
    kinds = [pa.array(texts).dictionary_encode()]
    kinds += [pa.array(texts, pa.string_view())] if hasattr(pa, "string_view") else []
    for number, column in enumerate(kinds):
        parquet(here / "docs.parquet", text=column)
        assert score("--input", "docs.parquet", "--scorer", SCORER, "--output", f"out{number}") == 0
        assert [row["text"] for row in read(here / f"out{number}")] == texts


def test_values_that_python_does_not_have(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    late = pa.array([None, 2**62, 0], pa.timestamp("us"))
    parquet(here / "docs.parquet", text=["one", "two", "three"], seen=late)
    assert score("--input", "docs.parquet", "--scorer", SCORER, "--output", "out") == 0
    found = [row["metadata"]["seen"] for row in read(here / "out")]
    assert found[0] is None and "4611686018427387904" in found[1] and found[2] == "1970-01-01 00:00:00"
    parquet(here / "docs.parquet", text=["one"], seen=pa.array([0], pa.timestamp("us", tz="Mars/Base")))
    assert score("--input", "docs.parquet", "--scorer", SCORER, "--output", "new") == 2
    assert "docs.parquet, rows 1 to 1: column 'seen' of timestamp[us, tz=Mars/Base]" in capsys.readouterr().err


def test_two_columns_of_one_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([pa.array(["one"])] * 2, names=["text", "text"]), here / "docs.parquet")
    assert score("--input", "docs.parquet", "--scorer", SCORER, "--output", "out") == 2
    assert "docs.parquet has two columns 'text': rename one of them" in capsys.readouterr().err
