"""`qwen-moe data score`: what is written, the same after a kill, in shards, by language; mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.curation.scores.annotate import ERROR, open_annotator
from qwen_moe.curation.scores.documents import Document, grouped
from qwen_moe.curation.scores.settings import ScoreSettings
from qwen_moe.curation.scores.summary import described
from qwen_moe.data.sources import Source
from tests.curation.scoring import content, document, read, score, write

MODEL = ("--document-tokens", 100, "--batch-documents", 4, "--batch-size", 4)
FUNCTION = """
def length(text, metadata):
    return len(text)

def several(text, metadata):
    return {"words": len(text.split()), "letters": float(len(text))}

def odd(text, metadata):
    if "stone" in text:
        return 1 / 0
    return {"fine": float("nan")} if "paper" in text else {"fine": 2}

def slow(text, metadata):
    import time
    time.sleep(0.02)
    return len(text)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of functions and with documents."""
    (tmp_path / f"own_{tmp_path.name}.py").write_text(FUNCTION)
    write(tmp_path / "docs" / "a.jsonl", [document(n) for n in range(11)])
    write(tmp_path / "docs" / "b.jsonl", [document(n) for n in range(11, 15)])
    (tmp_path / "docs" / "c.txt").write_text("alpha stone\n")
    (tmp_path / "docs" / "d.txt").write_text("beta water\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def function(here: Path, name: str) -> str:
    return f"own_{here.name}:{name}"


def test_what_a_model_scores(here: Path, scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score("--input", "docs", "--scorer", scorer, "--output", "out", *MODEL, "--dtype", "fp64") == 0
    rows = read(here / "out")
    given = [document(n) for n in range(15)]
    assert [(row["text"], row["id"]) for row in rows[:15]] == [(one["text"], one["id"]) for one in given]
    assert [row["id"] for row in rows[15:]] == ["docs/c.txt", "docs/d.txt"]
    settings = ScoreSettings(scorer=scorer, document_tokens=100, dtype="fp64")
    expected = open_annotator(settings).annotate([Document(row["text"], row["id"], row["metadata"]) for row in rows])
    for row, one in zip(rows, expected, strict=True):
        assert row["metadata"]["scores"] == pytest.approx(one["scores"], abs=1e-12)
    assert rows[0]["metadata"]["language"] == "en" and rows[0]["metadata"]["file_path"] == "docs/a.jsonl"
    said = capsys.readouterr()
    assert "documents: 17, files: 3" in said.out and "17 documents, " in said.err
    summary = json.loads((here / "out" / "summary.json").read_text())
    quality = [row["metadata"]["scores"]["quality"] for row in rows]
    assert summary["scores"]["quality"]["mean"] == pytest.approx(sum(quality) / 17)
    german = [q for q, row in zip(quality, rows, strict=True) if row["metadata"].get("language") == "de"]
    assert summary["scores"]["quality"]["languages"]["de"] == pytest.approx(
        {"documents": len(german), "mean": sum(german) / len(german)}
    )
    assert (here / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    # The random model hardly ever answers with a digit, which the command says.
    assert "the model gives a rating only" in said.out
    assert not list(here.rglob("*.lock"))


@pytest.mark.slow
def test_ranks_of_a_split_model(here: Path, scorer: Path) -> None:
    """--tp starts two processes, which score as one does."""
    arguments = ["--input", "docs", "--scorer", str(scorer), *map(str, MODEL), "--dtype", "fp64", "--output"]
    assert score(*arguments, "one") == 0
    command = [sys.executable, "-m", "qwen_moe", "data", "score", *arguments, "two", "--tp", "2"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, check=True)
    for one, two in zip(read(here / "one"), read(here / "two"), strict=True):
        assert one["id"] == two["id"]
        assert one["metadata"]["scores"] == pytest.approx(two["metadata"]["scores"], abs=1e-10)


def test_domains_and_scores_by_one_model(here: Path, scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domains = {"model": str(scorer), "domains": {"water": "rivers", "paper": "books"}}
    (here / "domains.yaml").write_text(json.dumps(domains))
    arguments = ("--input", "docs", "--scorer", scorer, "--dimensions", "quality", *MODEL, "--domains", "domains.yaml")
    assert score(*arguments, "--output", "out") == 0
    assert {row["metadata"]["domain"] for row in read(here / "out")} <= {"water", "paper"}
    assert all(list(row["metadata"]["scores"]) == ["quality"] for row in read(here / "out"))
    (here / "domains.yaml").write_text(json.dumps(domains | {"model": "missing"}))
    assert score(*arguments, "--output", "new") == 2
    assert "and the model missing of --domains differ" in capsys.readouterr().err
    assert score("--input", "docs", "--domains", "domains.yaml", "--output", "new") == 2
    assert "the model missing of --domains does not exist" in capsys.readouterr().err


def test_another_dimension_is_added(here: Path, scorer: Path) -> None:
    assert score("--input", "docs", "--scorer", function(here, "several"), "--output", "one") == 0
    assert score("--input", "one", "--scorer", function(here, "length"), "--output", "two") == 0
    for row in read(here / "two"):
        text = row["text"]
        expected = {"words": len(text.split()), "letters": len(text), "length": len(text)}
        assert row["metadata"]["scores"] == expected
        assert row["metadata"]["file_path"].startswith("docs/")


def test_shards_write_the_same_files(here: Path, scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--input", "docs", "--scorer", scorer, "--dimensions", "quality", *MODEL)
    assert score(*arguments, "--output", "whole") == 0
    assert score(*arguments, "--output", "parts", "--shard", "2/2") == 0
    assert "1 of 3 files are scored; other shards have the rest" in capsys.readouterr().out
    assert not (here / "parts" / "summary.json").exists()
    assert score(*arguments, "--output", "parts", "--shard", "1/2") == 0
    assert content(here / "parts") == content(here / "whole")
    # The same command again does nothing.
    before = {path.name: path.stat().st_mtime_ns for path in (here / "parts").glob("*.jsonl")}
    assert score(*arguments, "--output", "parts") == 0
    assert {path.name: path.stat().st_mtime_ns for path in (here / "parts").glob("*.jsonl")} == before


def test_a_killed_command_goes_on(here: Path) -> None:
    write(here / "docs" / "b.jsonl", [document(n, 30) for n in range(300)])
    arguments = ["--input", "docs", "--scorer", function(here, "slow"), "--batch-documents", "7"]
    assert score(*arguments, "--output", "whole") == 0
    command = [sys.executable, "-m", "qwen_moe", "data", "score", *arguments, "--output", "killed"]
    root = Path(__file__).parents[2]
    partial = here / "killed" / "00001.jsonl.partial"
    for least in (1, 80_000):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > least):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = partial.read_bytes()
    with partial.open("ab") as file:
        file.write(b'{"text": "cut of')
    assert score(*arguments, "--output", "killed") == 0
    assert content(here / "killed") == content(here / "whole")
    # What was there was not scored again.
    assert (here / "killed" / "00001.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])


def test_only_what_is_missing_is_scored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_moe.curation.scores import run

    arguments = ("--input", "docs", "--scorer", function(here, "length"), "--batch-documents", 4, "--output", "out")
    original, blocks = run._annotate, []

    def stopped(job: Any, block: list[Document]) -> None:
        if len(blocks) == 2:
            raise KeyboardInterrupt
        blocks.append([one.id for one in block])
        original(job, block)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_annotate", stopped)
        assert score(*arguments) == 130
    scored: list[str] = []

    def noted(job: Any, block: list[Document]) -> None:
        scored.extend(one.id for one in block)
        original(job, block)

    monkeypatch.setattr(run, "_annotate", noted)
    assert score(*arguments) == 0
    assert scored[:3] == ["d8", "d9", "d10"] and len(scored) == 17 - 8
    # Of a block that is not whole, as after a power failure, nothing is kept: blocks begin where they did.
    whole = (here / "out" / "00000.jsonl").read_bytes()
    (here / "out" / "00000.jsonl").unlink()
    (here / "out" / "00000.jsonl.partial").write_bytes(b"".join(whole.splitlines(keepends=True)[:6]) + b'{"te')
    scored.clear()
    assert score(*arguments) == 0
    assert scored == [f"d{n}" for n in range(4, 11)] and (here / "out" / "00000.jsonl").read_bytes() == whole
    # Of an input that has other documents now, nothing is kept.
    partial = here / "out" / "00000.jsonl.partial"
    (here / "out" / "00000.jsonl").rename(partial)
    partial.write_bytes(partial.read_bytes().replace(b'"id": "d3"', b'"id": "d4"'))
    scored.clear()
    assert score(*arguments) == 0
    assert scored == [f"d{n}" for n in range(11)]


def test_other_settings_do_not_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score("--input", "docs", "--scorer", function(here, "length"), "--output", "out") == 0
    assert score("--input", "docs", "--scorer", function(here, "several"), "--output", "out") == 2
    assert "was begun with other settings (annotators" in capsys.readouterr().err
    assert score("--input", "docs", "--scorer", function(here, "length"), "--output", "docs") == 2
    assert "holds a.jsonl and no scores" in capsys.readouterr().err
    changed = here / "out" / "00001.jsonl"
    changed.write_bytes(changed.read_bytes() + b"{}\n")
    assert score("--input", "docs", "--scorer", function(here, "length"), "--output", "out") == 2
    assert "00001.jsonl was changed since" in capsys.readouterr().err


def test_an_input_that_has_changed_is_noticed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its size is the same, so only its content tells."""
    path = write(here / "docs" / "c.jsonl", [{"text": "alpha"}])
    command = ("--input", "docs/c.jsonl", "--scorer", function(here, "length"), "--output", "out")
    assert score(*command) == 0 == score(*command)
    path.touch()
    assert score(*command) == 0
    write(path, [{"text": "gamma"}])
    assert score(*command) == 2
    assert "docs/c.jsonl has changed since out/00000.jsonl was made of it" in capsys.readouterr().err
    (here / "out" / "00000.jsonl").rename(here / "out" / "00000.jsonl.partial")  # as if it had been stopped there
    assert score(*command, "--batch-documents", 256) == 0
    assert [row["text"] for row in read(here / "out")] == ["gamma"]


def test_functions_that_fail_are_counted_with_their_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = function(here, "odd")
    assert score("--input", "docs", "--scorer", name, "--output", "out") == 2
    error = capsys.readouterr().err
    assert "documents failed, the first that of docs/a.jsonl, line " in error
    assert f"ZeroDivisionError: division by zero (own_{here.name}.py, line 10)" in error
    assert score("--input", "docs", "--scorer", name, "--output", "out", "--on-failure", "skip") == 0
    rows = read(here / "out")
    failed = [row for row in rows if "stone" in row["text"] or "paper" in row["text"]]
    assert len(rows) == 17 and 0 < len(failed) < 17
    for row in rows:
        assert (ERROR in row["metadata"]) == (row in failed) == ("scores" not in row["metadata"])
    summary = json.loads((here / "out" / "summary.json").read_text())
    assert summary["failed"] == len(failed) == sum(summary["failures"].values()) and len(summary["failures"]) == 2
    assert any("it returned nan for fine, expected a finite number" in reason for reason in summary["failures"])
    assert "documents have no score" in capsys.readouterr().out


def test_reasons_that_are_not_named_are_counted() -> None:
    values = {"scores": {}, "domains": {}, "shortened": 1, "failed": 10, "failures": {"it hung": 2, "it threw": 1}}
    assert described(values).splitlines() == [
        "1 document was shortened in the middle for the model",
        "10 documents have no score: 2 times it hung; 1 time it threw; 7 for other reasons",
    ]


def test_bad_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "docs" / "b.jsonl", [document(1), "{", {"other": 1}, {"text": " "}, document(2)])
    arguments = ("--input", "docs", "--scorer", function(here, "length"), "--output", "out")
    assert score(*arguments) == 2
    assert "docs/b.jsonl, line 2 is not JSON" in capsys.readouterr().err
    assert score(*arguments, "--on-bad-line", "skip") == 0
    assert "left out: 2 malformed lines, 1 empty" in capsys.readouterr().out
    assert len(read(here / "out")) == 11 + 2 + 2


def test_metadata_of_another_form(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "docs" / "b.jsonl", [{"text": "alpha", "metadata": 7}])
    assert score("--input", "docs", "--scorer", function(here, "length"), "--output", "out") == 2
    assert "docs/b.jsonl, line 1: metadata is int, expected an object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"old": NaN}', "the score old is nan, expected a finite number"),
        ('{"old": "good"}', "the score old is 'good', expected a finite number"),
        ("[3]", r"scores is \[3\], expected an object"),
        ('{}, "rating_mass": {"old": "x"}', "the rating_mass old is 'x', expected a finite number"),
    ],
)
def test_scores_that_a_document_has_already(
    here: Path, given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "docs" / "b.jsonl", [f'{{"text": "alpha", "metadata": {{"scores": {given}}}}}'])
    assert score("--input", "docs", "--scorer", function(here, "length"), "--output", "out") == 2
    assert re.search(f"docs/b.jsonl, line 1: {message}", capsys.readouterr().err)


def test_half_a_character_in_metadata(here: Path) -> None:
    write(here / "docs" / "b.jsonl", [r'{"text": "\u00fc", "metadata": {"odd": "\ud800"}}'])
    assert score("--input", "docs/b.jsonl", "--scorer", function(here, "length"), "--output", "out") == 0
    (row,) = read(here / "out")
    assert row["text"] == "ü" and row["metadata"]["odd"] == "\ud800"


def test_lines_of_other_programs(here: Path) -> None:
    """Keys beside text, id and metadata become metadata, and an id is made of file and line."""
    write(here / "docs" / "b.jsonl", [{"body": "alpha", "url": "u", "metadata": {"language": "en"}}])
    arguments = ("--input", "docs/b.jsonl", "--text-key", "body", "--scorer", function(here, "length"))
    assert score(*arguments, "--output", "out") == 0
    (row,) = read(here / "out")
    assert row["text"] == "alpha" and row["id"] == "docs/b.jsonl, line 1"
    metadata = {"url": "u", "language": "en", "file_path": "docs/b.jsonl", "scores": {"length": 5.0}}
    assert row["metadata"] == metadata


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out"], "there is nothing to do: give --scorer"),
        (["--scorer", "missing"], "--output is missing"),
        (["--scorer", "missing", "--output", "out"], "--scorer missing does not exist: give a Hugging Face directory"),
        (["--scorer", "missing:f", "--output", "out"], "scorer missing:f cannot be imported: ModuleNotFoundError"),
        (["--scorer", "json:nothing", "--output", "out"], "scorer json:nothing: the module has no function nothing"),
        (["--scorer", "json:loads", "--output", "out", "--dimensions", "quality"], "has dimensions of its own"),
        (["--scorer", "docs", "--output", "out", "--dimensions", "size"], "dimension 'size' is not known"),
        (["--scorer", "classifier:docs", "--output", "out"], "classifier docs/classifier.json does not exist"),
        (["--scorer", "json:loads", "--output", "out", "--tp", "2"], "no model scores here"),
        (["--scorer", "json:loads", "--output", "out", "--shard", "3/2"], "of 2 shards the first is 1 and the last 2"),
        (["--scorer", "docs", "--output", "out", "--language", "xx"], "language is 'xx', expected one of en, de"),
        (["--train-classifier", "new", "--output", "out"], "--output is for scoring"),
        (["--train-classifier", "docs"], "--train-classifier docs is there already"),
        (["--target", "domain", "--scorer", "json:loads", "--output", "out"], "--target is what a classifier learns"),
    ],
)
def test_what_is_refused(here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert score("--input", "docs", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (here / "out").exists() and not (here / "new").exists()


def test_an_empty_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    assert score("--input", "empty", "--scorer", function(here, "length"), "--output", "out") == 2
    assert "empty contains no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"), [("\n\n", "no rows"), ('{"text": " "}\n', "1 empty"), ("{\n", "1 malformed line")]
)
def test_inputs_without_a_document(here: Path, content: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "none.jsonl").write_text(content)
    arguments = ("--input", "none.jsonl", "--scorer", function(here, "length"), "--on-bad-line", "skip")
    assert score(*arguments, "--output", "out") == 2
    assert f"--input none.jsonl has no document with text ({why})" in capsys.readouterr().err
    assert not (here / "out" / "summary.json").exists()


def test_which_files_go_together() -> None:
    kinds = ["jsonl", "text", "text", "jsonl", "text", "python"]
    sources = [Source(path=Path(str(n)), kind=kind, bytes=10) for n, kind in enumerate(kinds)]
    assert [[str(one.path) for one in group] for group in grouped(sources)] == [["0"], ["1", "2"], ["3"], ["4", "5"]]
    large = [Source(path=Path(str(n)), kind="text", bytes=50 << 20) for n in range(2)]
    many = [Source(path=Path(str(n)), kind="text", bytes=1) for n in range(600)]
    assert [len(group) for group in grouped(large)] == [1, 1] and [len(group) for group in grouped(many)] == [512, 88]
