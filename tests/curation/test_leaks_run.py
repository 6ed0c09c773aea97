"""`data decontaminate`: the same files from any number of processes and after kills; formats, rows, record, report."""

import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launchers.folder import atomic
from qwen_moe.cli import main
from qwen_moe.curation.leaks import run, work
from qwen_moe.data.checked import share_checked
from qwen_moe.data.manifest import read_manifest
from qwen_moe.data.tokenizer import train_tokenizer
from tests.curation.leaks_data import changed, decontaminate, draw, read_jsonl, write_jsonl

LEAKS = (3, 40, 77)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """`docs.jsonl` with 100 documents, of which three are leaks, and `tests.jsonl` with 12 tests."""
    rng = random.Random(1)
    tests = [draw(rng, 40) for _ in range(12)]
    rows: list[dict[str, Any]] = [{"text": " ".join(draw(rng, 120)), "id": str(n), "extra": [n]} for n in range(100)]
    for test, n in enumerate(LEAKS):
        rows[n]["text"] = f"{rows[n]['text']} {', '.join(changed(rng, tests[test], 0.2)).upper()}. {rows[n]['text']}"
    write_jsonl(tmp_path / "docs.jsonl", rows)
    write_jsonl(
        tmp_path / "tests.jsonl", [{"question": " ".join(test[:20]), "answer": " ".join(test[20:])} for test in tests]
    )
    return tmp_path


WRITES = (
    ("run", "replaced"),
    ("run", "write_json"),
    ("record", "write_json"),
    ("report", "write_json"),
    ("report", "write_text"),
)
KEYS = ("--test-key", "question,answer")
PREPARE = ("data", "prepare", "--train-tokenizer", "--vocab-size", "300", "--workers", "1")


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_leaks_are_dropped_and_all_other_rows_stay_as_they_are(corpus: Path) -> None:
    assert decontaminate(corpus, *KEYS) == 0
    lines = (corpus / "docs.jsonl").read_text().splitlines()
    kept = (corpus / "clean" / "clean-00000.jsonl").read_text().splitlines()
    assert kept == [line for n, line in enumerate(lines) if n not in LEAKS]
    dropped = read_jsonl(corpus / "clean" / "dropped" / "dropped-00000.jsonl")
    for number, (n, row) in enumerate(zip(LEAKS, dropped, strict=True)):
        leak = row["metadata"]["leak"]
        assert row["metadata"]["filter_reason"] == "leak" and row | {"metadata": 0} == json.loads(lines[n]) | {
            "metadata": 0
        }
        assert (leak["file"], leak["line"]) == (str(corpus / "docs.jsonl"), n + 1)
        assert (leak["test_file"], leak["test_line"]) == (str(corpus / "tests.jsonl"), number + 1)
        assert leak["common"] >= 32 and leak["shorter"] == 40 and len(leak["matched"].split()) == leak["common"]
        assert leak["matched"].split() == "".join(leak["test_passage"][1::2]).split()
    figures = json.loads((corpus / "clean" / "leaks.json").read_text())
    assert figures["counts"] == {"rows": 100, "kept": 97, "dropped": 3, "bad": 0, "by_chance": 0}
    assert figures["tests"] == {str(corpus / "tests.jsonl"): {"sequences": 12, "leaked_sequences": 3, "documents": 3}}


def test_shards_and_processes_change_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_BATCH_BYTES", 4_000)
    found = []
    for workers, shard in (("1", 20_000), ("2", 20_000), ("1", 10**9)):
        monkeypatch.setattr("qwen_moe.curation.leaks.command._MEGABYTE", shard)
        assert decontaminate(corpus, *KEYS, "--workers", workers, "--shard-size", "1", "--overwrite") == 0
        found.append(contents(corpus / "clean"))
        names = sorted((corpus / "clean").glob("clean-*.jsonl"))
        rows = [row for path in names for row in read_jsonl(path)]
        assert len(names) == (1 if shard == 10**9 else 3) and [int(row["id"]) for row in rows] == [
            n for n in range(100) if n not in LEAKS
        ]
    assert found[0] == found[1]


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_run_that_stops_at_any_write_goes_on(corpus: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_BATCH_BYTES", 4_000)
    monkeypatch.setattr("qwen_moe.curation.leaks.command._MEGABYTE", 20_000)
    assert decontaminate(corpus, *KEYS, "--shard-size", "1") == 0
    undisturbed = contents(corpus / "clean")
    (corpus / "clean").rename(corpus / "undisturbed")
    writes = 0

    class Stopped(BaseException):
        pass

    def counted(write: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == stop:
                raise Stopped
            return write(*given, **named)

        return call

    with monkeypatch.context() as patch:
        for module, name in WRITES:
            patch.setattr(f"qwen_moe.curation.leaks.{module}.{name}", counted(getattr(atomic, name)))
        with pytest.raises(Stopped):
            decontaminate(corpus, *KEYS, "--shard-size", "1")
    assert decontaminate(corpus, *KEYS, "--shard-size", "1") == 0
    assert contents(corpus / "clean") == undisturbed


def test_kill_in_the_middle_then_again(corpus: Path) -> None:
    rows = read_jsonl(corpus / "docs.jsonl")
    write_jsonl(corpus / "docs.jsonl", [row | {"copy": n} for n in range(30) for row in rows])
    script = (
        "import sys; from qwen_moe.curation.leaks import command, work; from qwen_moe.cli import main; "
        "work._BATCH_BYTES, command._MEGABYTE = 50_000, 300_000; sys.exit(main(sys.argv[1:]))"
    )
    options = [
        "--input",
        str(corpus / "docs.jsonl"),
        "--against",
        str(corpus / "tests.jsonl"),
        *KEYS,
        "--shard-size",
        "1",
    ]
    command = [sys.executable, "-c", script, "data", "decontaminate", *options, "--workers", "1", "--output"]
    subprocess.run([*command, str(corpus / "undisturbed")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(corpus / "clean")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list((corpus / "clean" / "progress").glob("00001.json")) or not list((corpus / "clean").glob(".clean-*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (corpus / "clean" / "decontaminated.json").exists()
    subprocess.run([*command, str(corpus / "clean")], check=True, capture_output=True)
    assert contents(corpus / "clean") == contents(corpus / "undisturbed")
    assert len(list((corpus / "clean").glob("clean-*.jsonl"))) > 3


def test_a_corpus_that_changes_while_it_is_checked_is_refused(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(*arguments: Any) -> Any:
        (corpus / "docs.jsonl").write_bytes((corpus / "docs.jsonl").read_bytes() + b"\n")
        return real(*arguments)

    real = run._write_shard
    monkeypatch.setattr(run, "_write_shard", change)
    assert decontaminate(corpus, *KEYS) == 2
    assert "docs.jsonl was changed while it was read: wait until" in capsys.readouterr().err
    assert not (corpus / "clean" / "decontaminated.json").exists()


def test_again_does_nothing_and_other_tests_are_refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decontaminate(corpus, *KEYS) == 0
    before = {path: path.stat().st_mtime_ns for path in (corpus / "clean").glob("*.jsonl")}
    capsys.readouterr()
    (corpus / "clean" / "leaks.html").unlink()
    assert decontaminate(corpus, *KEYS) == 0
    assert "already checked: 3 of 100 documents dropped" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (corpus / "clean").glob("*.jsonl")}
    assert (corpus / "clean" / "leaks.html").exists()
    assert decontaminate(corpus, "--test-key", "question") == 2
    assert "made from other inputs, tests or settings: use --overwrite" in capsys.readouterr().err
    assert decontaminate(corpus, "--test-key", "question", "--overwrite") == 0


def test_other_formats_have_the_same_leaks(corpus: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = read_jsonl(corpus / "docs.jsonl")
    (corpus / "docs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:50]), corpus / "docs" / "a.parquet")
    text = "".join(json.dumps(row) + "\n" for row in rows[50:90]).encode()
    (corpus / "docs" / "b.jsonl.gz").write_bytes(gzip.compress(text))
    for n in range(90, 100):
        (corpus / "docs" / f"c{n}.txt").write_text(rows[n]["text"])
    assert decontaminate(corpus, *KEYS, inputs="docs") == 0
    kept = read_jsonl(corpus / "clean" / "clean-00000.jsonl")
    assert [row["text"] for row in kept] == [row["text"] for n, row in enumerate(rows) if n not in LEAKS]
    assert kept[0] == rows[0] and kept[-1]["metadata"] == {"file_path": str(corpus / "docs" / "c99.txt")}
    places = [row["metadata"]["leak"] for row in read_jsonl(corpus / "clean" / "dropped" / "dropped-00000.jsonl")]
    assert [(Path(one["file"]).name, one["line"]) for one in places] == [
        ("a.parquet", 4),
        ("a.parquet", 41),
        ("b.jsonl.gz", 28),
    ]


def test_conversations_pairs_and_queries(tmp_path: Path) -> None:
    rng = random.Random(2)
    test = draw(rng, 30)
    asked, answered = " ".join(changed(rng, test[:15], 0.1)), " ".join(test[15:])
    clean = " ".join(draw(rng, 50))
    user = {"role": "user", "content": asked}
    rows: list[dict[str, Any]] = [
        {"messages": [user, {"role": "assistant", "content": answered}]},
        {"prompt": [user], "completion": answered},
        {"prompt": asked, "chosen": answered, "rejected": "no"},
        {"prompt": asked, "chosen": "no", "rejected": [{"role": "assistant", "content": answered}]},
        {"prompt": f"{asked} {answered}", "answer": "12"},
        {"prompt": "say it", "chosen": f"{asked} {answered}", "rejected": "no"},
        {"prompt": "say it", "chosen": "no", "rejected": f"{asked} {answered}"},
        {"prompt": "say it", "completion": f"{asked} {answered}"},
        {
            "messages": [
                user,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"q": answered}}}]},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": f"{asked} {answered}"}]}]},
    ]
    kept = [
        {"messages": [{"role": "user", "content": clean}]},
        {"prompt": clean, "chosen": "a", "rejected": asked[:30]},
    ]
    write_jsonl(tmp_path / "docs.jsonl", [kept[0], *rows, kept[1]])
    write_jsonl(tmp_path / "tests.jsonl", [{"messages": [{"role": "user", "content": " ".join(test)}]}])
    assert decontaminate(tmp_path) == 0
    assert read_jsonl(tmp_path / "clean" / "clean-00000.jsonl") == kept
    assert len(read_jsonl(tmp_path / "clean" / "dropped" / "dropped-00000.jsonl")) == len(rows)


def test_the_literal_rule_says_what_it_costs(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    tests = [draw(rng, 40) for _ in range(12)]
    spread = " ".join(f"{word} {' '.join(['filler'] * 9)}" for word in tests[5])
    write_jsonl(corpus / "docs.jsonl", [{"text": spread}, {"text": " ".join(tests[4])}, {"text": "short"}])
    assert decontaminate(corpus, *KEYS, "--rule", "report") == 0
    assert "of 2 dropped documents, 1 have no window of twice a test's length" in capsys.readouterr().out
    assert "1 have no window" in (corpus / "clean" / "leaks.html").read_text()


def test_text_is_escaped_in_the_report(tmp_path: Path) -> None:
    test = " ".join(f"w{n}" for n in range(14))
    (tmp_path / "docs<b>").mkdir()
    write_jsonl(tmp_path / "docs<b>" / "a.jsonl", [{"text": f"<script>alert(1)</script> {test}"}])
    write_jsonl(tmp_path / "tests.jsonl", [{"text": test}])
    assert decontaminate(tmp_path, "--report", str(tmp_path / "page.html"), inputs="docs<b>") == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "docs<b>" not in page and "docs&lt;b&gt;" in page and "http" not in page
    assert f"<mark>{test} </mark>" in page


def test_tokens_of_a_tokenizer(corpus: Path) -> None:
    texts = [row["text"] for row in read_jsonl(corpus / "docs.jsonl")]
    train_tokenizer(texts, 400, corpus / "tokenizer")
    assert decontaminate(corpus, *KEYS, "--tokenizer", str(corpus / "tokenizer")) == 0
    dropped = read_jsonl(corpus / "clean" / "dropped" / "dropped-00000.jsonl")
    assert [int(row["id"]) for row in dropped] == list(LEAKS)
    assert json.loads((corpus / "clean" / "decontaminated.json").read_text())["tokens"].startswith("tokenizer ")


def test_prepared_data_know_what_they_were_checked_against(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decontaminate(corpus, *KEYS) == 0
    tests = [f"{row['question']}\n{row['answer']}" for row in read_jsonl(corpus / "tests.jsonl")]
    asked = [tests[0].upper().replace(" ", ",  "), tests[1], "never seen", tests[2]]
    prepare = [*PREPARE, "--input", str(corpus / "clean")]
    assert main([*prepare, "--output", str(corpus / "one")]) == 0
    assert "dropped as leaks of tests" in capsys.readouterr().err
    manifest = read_manifest(corpus / "one")
    assert manifest is not None and manifest.documents == 97
    assert manifest.decontaminated["checks"][0]["rule"] == "windowed"
    assert share_checked(corpus / "one", asked) == 0.75
    assert share_checked(corpus / "missing", asked) == 0.0 and share_checked(corpus / "one", []) == 0.0

    write_jsonl(corpus / "other" / "unchecked.jsonl", [{"text": "more"}])
    assert main([*prepare, str(corpus / "other"), "--output", str(corpus / "two")]) == 0
    assert "unchecked.jsonl is not as `qwen-moe data decontaminate` wrote it" in capsys.readouterr().err
    assert share_checked(corpus / "two", asked) == 0.0

    write_jsonl(corpus / "clean" / "added.jsonl", [{"text": "added later"}])
    assert main([*prepare, "--output", str(corpus / "three")]) == 0
    assert share_checked(corpus / "three", asked) == 0.0


def test_data_that_are_checked_again_after_they_were_prepared(corpus: Path) -> None:
    rows = read_jsonl(corpus / "tests.jsonl")
    write_jsonl(corpus / "fewer.jsonl", [rows[n] for n in (0, 1, 2, 5)])
    assert decontaminate(corpus, *KEYS, against="fewer.jsonl") == 0
    prepare = [*PREPARE, "--output", str(corpus / "data")]
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    assert main([*prepare, "--input", str(corpus / "clean")]) == 0
    assert share_checked(corpus / "data", texts) == 4 / 12
    made = (corpus / "data.bin").stat().st_mtime_ns
    assert decontaminate(corpus, *KEYS, "--overwrite") == 0  # against all tests, with the same outcome
    assert main([*prepare, "--input", str(corpus / "clean")]) == 0
    assert share_checked(corpus / "data", texts) == 1.0
    assert (corpus / "data.bin").stat().st_mtime_ns == made
    (corpus / "clean" / "decontaminated.json").unlink()
    assert main([*prepare, "--input", str(corpus / "clean"), "--overwrite"]) == 0  # now reads what was dropped, too
    assert share_checked(corpus / "data", texts) == 0.0


def test_the_record_beside_clean_texts_is_no_text_that_is_left_out(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decontaminate(corpus, *KEYS) == 0
    capsys.readouterr()
    assert main([*PREPARE, "--output", str(corpus / "data"), "--input", str(corpus / "clean")]) == 0
    told = "".join(capsys.readouterr())
    assert "reading 1 file, " in told and ".json (" not in told


def test_of_two_inputs_the_tests_count_that_both_were_checked_against(corpus: Path) -> None:
    rows = read_jsonl(corpus / "tests.jsonl")
    write_jsonl(corpus / "fewer.jsonl", rows[:5])
    assert decontaminate(corpus, *KEYS) == 0
    (corpus / "clean").rename(corpus / "first")
    assert decontaminate(corpus, *KEYS, against="fewer.jsonl") == 0
    prepare = [*PREPARE, "--output", str(corpus / "data")]
    assert main([*prepare, "--input", str(corpus / "first"), str(corpus / "clean")]) == 0
    assert share_checked(corpus / "data", [f"{row['question']} {row['answer']}" for row in rows]) == 5 / 12
