"""`qwen-moe data curate`: counts, reasons, ids, bad input, changed settings."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_moe.config import parse_config, read_recipe
from qwen_moe.curation.machine_text import python_docs, python_packages
from qwen_moe.data.manifest import read_manifest
from tests.curation.curations import curate, documents, outputs, recipe, rows, sentences, write_corpus

pytest.importorskip("datatrove")
pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a curation of it in ``run``."""
    folder = tmp_path_factory.mktemp("curation")
    write_corpus(folder / "corpus")
    assert curate(recipe(folder)) == 0
    return folder


@pytest.fixture
def facts(done: Path) -> dict[str, Any]:
    found = json.loads((done / "run/curate.json").read_text())
    return {step["step"]: step for step in found["steps"]}


def why(capsys: pytest.CaptureFixture[str], folder: Path, identity: str) -> str:
    capsys.readouterr()
    assert curate(recipe(folder), "--why", identity) == 0
    return capsys.readouterr().out


def test_every_document_is_counted_once(done: Path, facts: dict[str, Any]) -> None:
    assert facts["read"]["by_domain"] == {"notes": 6, "prose": 25, "stars": 12}
    for before, after in (("read", "filters"), ("filters", "deduplication")):
        dropped = sum(sum(reasons.values()) for reasons in facts[after]["dropped"].values())
        assert facts[before]["documents"] == facts[after]["documents"] + dropped
    assert facts["filters"]["dropped"] == {
        "length": {"too_few_characters": 1}, "symbols": {"too_many_symbols": 1}, "language": {"language_de": 1},
    }  # fmt: skip
    assert facts["deduplication"]["dropped"] == {"exact": {"equal_text": 1}, "minhash": {"similar_text": 1}}


def test_ids_are_file_and_line(done: Path) -> None:
    found = {row["id"]: row for row in documents(done / "run/1-read/kept")}
    prose = done / "corpus/prose.jsonl"
    for number, row in enumerate(rows(), start=1):
        assert found[f"{prose}:{number}"]["text"] == row["text"]
    assert found[f"{prose}:21"]["metadata"]["given_id"] == "given"
    assert found[f"{prose}:21"]["metadata"]["source"] == "elsewhere"
    assert found[f"{done}/corpus/stars.parquet:5"]["text"] == sentences(104, 8)
    assert found[f"{done}/corpus/stars.parquet:5"]["metadata"]["stars"] == 4
    assert found[f"{done}/corpus/notes/2.md"]["text"] == sentences(202, 10)


def test_why_says_what_each_step_decided(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prose = f"{done}/corpus/prose.jsonl"
    text = why(capsys, done, f"{prose}:25")
    assert "filters:          dropped by language: language_de" in text and "deduplication" not in text
    assert f"dropped by exact: equal_text; kept of its 2 documents: {prose}:4" in why(capsys, done, f"{prose}:21")
    similar = [why(capsys, done, f"{prose}:{line}") for line in (5, 22)]
    assert sum("dropped by minhash: similar_text" in text for text in similar) == 1
    assert sum("(minhash)" in text for text in similar) == 1
    assert "weights:          kept, domain notes is there" in why(capsys, done, f"{done}/corpus/notes/2.md")
    assert curate(recipe(done), "--why", f"{prose}:99") == 2
    assert f"ids such as {prose}" in capsys.readouterr().err


def test_weights_reach_their_targets(done: Path, facts: dict[str, Any]) -> None:
    shares = facts["weights"]["domains"]
    total = sum(share["tokens_after"] for share in shares.values())
    for name, target in {"prose": 0.4, "notes": 0.4, "stars": 0.2}.items():
        assert shares[name]["tokens_after"] / total == pytest.approx(target, abs=0.03)
        kept = documents(done / f"run/7-weights/kept/{name}")
        assert len(kept) == shares[name]["documents_after"]
    assert shares["notes"]["copies"] >= 1 and shares["prose"]["repeats"] < 1
    assert len({row["id"] for row in documents(done / "run/7-weights/kept")}) == facts["weights"]["documents"]


def test_the_blend_is_a_part_of_a_recipe(done: Path, facts: dict[str, Any]) -> None:
    blend = yaml.safe_load((done / "run/8-prepare/blend.yaml").read_text())
    assert sum(one["weight"] for one in blend["data"]["train"]) == pytest.approx(1, abs=1e-5)
    shares = facts["weights"]["domains"]
    for one in blend["data"]["train"]:
        manifest = read_manifest(Path(one["prefix"]))
        share = shares[Path(one["prefix"]).name]
        assert manifest is not None
        assert (manifest.documents, manifest.tokens) == (share["documents_after"], share["tokens_after"])
    values = read_recipe(Path("demo")) | {"data": blend["data"] | {"sequence_length": 32}}
    assert [one.weight for one in parse_config(values, "blend").data.train] == [
        w["weight"] for w in blend["data"]["train"]
    ]


def test_again_does_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = outputs(done / "run")
    capsys.readouterr()
    assert curate(recipe(done)) == 0
    assert capsys.readouterr().err.count("done before") == 5
    assert outputs(done / "run") == before


def test_the_number_of_workers_changes_nothing(done: Path) -> None:
    assert curate(recipe(done, run="two", workers=2)) == 0
    assert outputs(done / "two") == outputs(done / "run")


def test_changed_settings_are_named_and_redone_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus")
    path = recipe(tmp_path)
    assert curate(path, "--until", "filters") == 0
    assert curate(path, "--until", "filters", "on_bad_line=skip") == 2
    assert "on_bad_line was 'error', is now 'skip'" in capsys.readouterr().err
    changed = recipe(tmp_path, filters=[{"length": {"min_characters": 10_000}}])
    assert curate(changed, "--until", "filters") == 2
    assert "step filters" in (message := capsys.readouterr().err) and "--redo filters" in message
    assert curate(changed, "--until", "filters", "--redo", "filters") == 0
    assert documents(tmp_path / "run/2-filters/kept") == []
    assert len(documents(tmp_path / "run/2-filters.old-1/kept")) > 30
    assert curate(changed) == 2
    assert "no document is left to weigh: step filters has dropped the last" in capsys.readouterr().err
    (tmp_path / "corpus/notes/new.md").write_text("Another note.")
    assert curate(changed, "--until", "read") == 2
    assert f"input {tmp_path}/corpus/notes has changed" in capsys.readouterr().err


def test_a_step_that_was_begun_with_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its finished tasks would otherwise be mixed with tasks of the new settings."""
    write_corpus(tmp_path / "corpus")
    path = recipe(tmp_path)
    assert curate(path, "--until", "read") == 0
    begun = tmp_path / "run/2-filters/begun.json"
    begun.parent.mkdir()
    begun.write_text(json.dumps({"filters": [], "words": "simple"}))
    assert curate(path) == 2
    assert "step filters" in (message := capsys.readouterr().err) and "or begun, with other settings" in message
    assert curate(path, "--redo", "filters", "--until", "filters") == 0


def test_bad_lines_are_named_and_left_out_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"text": "A good line."}).encode()
    lines = [good, b"{not json", b'{"other": 1}', b'{"text": 5}', b'{"text": "\xff"}', b'{"text": "a\\ud800"}', b"",
             b'{"text": "nul \\u0000"}', b'{"text": " "}', b'{"text": "a", "text": "b"}', good]  # fmt: skip
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    inputs = [{"path": str(tmp_path / "bad.jsonl"), "domain": "x"}]
    path = recipe(tmp_path, input=inputs, tasks=2, filters=None, deduplication=None, weights=None)
    assert curate(path, "--until", "read") == 2
    message = capsys.readouterr().err
    assert "7 lines, rows or files cannot be read" in message and "on_bad_line: skip" in message
    for number in (2, 3, 4, 5, 6):
        assert f"bad.jsonl, line {number}: " in message
    assert curate(path, "--until", "read", "on_bad_line=skip") == 0
    assert "left out 7 lines" in capsys.readouterr().err
    assert [row["id"] for row in documents(tmp_path / "run/1-read/kept")] == [
        f"{tmp_path}/bad.jsonl:{n}" for n in (1, 11)
    ]
    assert json.loads((tmp_path / "run/curate.json").read_text())["steps"][0]["bad"]["empty"] == 1


def test_what_an_earlier_step_knows_of_a_document_is_kept(tmp_path: Path) -> None:
    """Its file, by which rules of domains go, and its domain; of other documents these are those of the input."""
    before = {"file_path": "tests/a.py", "domain": "code", "line": 7}
    rows = [{"text": sentences(1, 20), "metadata": before}, {"text": sentences(2, 20)}]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"path": str(tmp_path / "kept.jsonl"), "domain": "all"}
    path = recipe(tmp_path, input=[given], filters=None, deduplication=None, weights=None)
    assert curate(path, "--until", "read") == 0
    found = [row["metadata"] for row in documents(tmp_path / "run/1-read/kept")]
    assert found == [before, {"file_path": given["path"], "line": 2, "domain": "all"}]


def test_keys_that_a_curation_needs_itself_are_renamed(tmp_path: Path) -> None:
    """Foreign corpora have keys such as `edited`; documents that were dropped elsewhere have their former reason."""
    given = {"edited": False, "token_count": "many", "filter": "old", "filter_reason": "old", "leak": 1,
             "duplicate_count": "x", "minhash_cluster_id": 7, "minhash_cluster_size": 3}  # fmt: skip
    rows = [{"text": sentences(1, 20), "domain": None} | given, {"text": sentences(1, 20)} | given]
    rows += [{"text": sentences(2, 20), "edited": {"symbol_lines": [9, 5]}, "token_count": 3}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [{"path": str(tmp_path / "odd.jsonl"), "domain": "all"}]
    path = recipe(tmp_path, input=inputs, tasks=1, filters=None, deduplication={"minhash": None}, weights=None)
    assert curate(path, "--until", "deduplication") == 0
    first, second = (row["metadata"] for row in documents(tmp_path / "run/5-deduplication/kept"))
    assert {f"given_{name}": value for name, value in given.items()}.items() <= first.items()
    assert first["domain"] == "all" and not set(given) & set(first)
    assert second["edited"] == {"symbol_lines": [9, 5]} and second["token_count"] == 3
    facts = json.loads((tmp_path / "run/curate.json").read_text())["steps"]
    assert next(one for one in facts if one["step"] == "deduplication")["dropped"] == {"exact": {"equal_text": 1}}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"scores": [1]}, "scores is [1], expected an object with a number for each dimension"),
        ({"metadata": {"scores": {"a": "high"}}}, "the score a is 'high', expected a finite number"),
        ({"scores": {"a": None}}, "the score a is None, expected a finite number"),
        ({"domain": "../x"}, "its key domain, which counts before the input's: '../x' is no domain"),
        ({"domain": ["a"]}, "is no domain: give up to 64 letters"),
    ],
)
def test_metadata_that_no_step_can_read(
    row: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.jsonl").write_text(
        json.dumps({"text": "Good."}) + "\n" + json.dumps({"text": "Odd."} | row) + "\n"
    )
    inputs = [{"path": str(tmp_path / "odd.jsonl")}]
    path = recipe(tmp_path, input=inputs, tasks=1, filters=None, deduplication=None, weights=None)
    assert curate(path, "--until", "read") == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'odd.jsonl'}, line 2: " in message and said in message
    assert curate(path, "--until", "read", "on_bad_line=skip") == 0
    assert len(documents(tmp_path / "run/1-read/kept")) == 1


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    try:
        (folder / "caf\udce9.txt").write_text(sentences(1, 20))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert curate(recipe(tmp_path, input=[str(folder)])) == 2
    assert "caf\\udce9.txt' is not UTF-8, and documents are named by their file: rename it" in capsys.readouterr().err


def test_half_a_character_in_metadata_reaches_the_end(tmp_path: Path) -> None:
    """JSON can spell it and UTF-8 cannot, so it must not stop a later step."""
    row = {"text": sentences(1, 20), "title": "\ud800"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row) + "\n")
    path = recipe(tmp_path, input=[str(tmp_path / "odd.jsonl")], filters=["symbols"], deduplication=None, weights=None)
    assert curate(path, "--until", "weights") == 0
    assert documents(tmp_path / "run/7-weights/kept")[0]["metadata"]["title"] == "\ud800"


def test_rows_of_parquet_without_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["one", None, "three"]}), file)
    common: dict[str, Any] = {"filters": None, "deduplication": None, "weights": None}
    path = recipe(tmp_path, input=[str(file)], **common)
    assert curate(path, "--until", "read") == 2
    assert f"{file} has no column 'text' (found: content)" in capsys.readouterr().err
    path = recipe(tmp_path, input=[{"path": str(file), "text_key": "content"}], **common)
    assert curate(path, "--until", "read") == 2
    assert "some.parquet, row 2: the text is NoneType, expected text" in capsys.readouterr().err
    file.write_bytes(b"PAR1 no")
    assert curate(path, "--until", "read") == 2
    assert "is not a Parquet file" in capsys.readouterr().err


def test_damaged_files_and_other_encodings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    def attempt(file: Path) -> str:
        """The message when it is read in two processes."""
        path = recipe(
            tmp_path,
            run=f"run-{file.stem}",
            input=[str(file)],
            workers=2,
            filters=None,
            deduplication=None,
            weights=None,
        )
        assert curate(path, "--until", "read") == 2
        return capsys.readouterr().err

    packed = tmp_path / "cut.jsonl.gz"
    lines = "".join(json.dumps({"text": sentences(seed, 20)}) + "\n" for seed in range(50))
    packed.write_bytes(gzip.compress(lines.encode())[:-2000])
    assert str(packed) in (message := attempt(packed)) and "Traceback" not in message
    damaged = tmp_path / "damaged.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [sentences(seed, 20) for seed in range(50)]}), damaged)
    content = bytearray(damaged.read_bytes())
    content[200:2000] = bytes(1800)
    damaged.write_bytes(content)
    assert f"{damaged} is damaged after row 0" in attempt(damaged)
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_bytes("Über die Straße.".encode("latin-1"))
    (folder / "b.md").write_bytes("Two bytes a character.".encode("utf-16"))
    (folder / "c.md").write_text("A good one.")
    message = attempt(folder)
    assert "2 lines, rows or files cannot be read" in message
    assert (
        f"{folder}/a.md: byte 0 (0xdc) is not UTF-8" in message
        and f"{folder}/b.md: byte 0 (0xff) is not UTF-8" in message
    )
    assert "--on-bad-utf8" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": [{"gopher_qualty": {}}]}, "did you mean 'gopher_quality'?"),
        ({"filters": [{"gopher_quality": {"min_words": 3}}]}, "unknown setting 'min_words'; did you mean 'min_doc_words'?"),
        ({"filters": [{"gopher_quality": {"min_doc_words": "many"}}]}, "min_doc_words = 'many': Input should be a whole"),
        ({"filters": [{"regex": {"regex_exp": "("}}]}, "missing ), unterminated subpattern"),
        ({"filters": [{"language": {"languages": ["xx"]}}]}, "language 'xx' is not known: give some of en, de"),
        ({"words": "tlh"}, "the library's word tokenizer of this language cannot run"),
        ({"tasks": 0}, "tasks = 0"),
        ({"weights": {"targets": {"prose": 0.8, "notes": 0.4}}}, "targets sum to 1.2"),
        ({"prepare": {"train_tokenizer": True}}, "vocab_size is the size of a trained tokenizer"),
        ({"input": None}, "there is no text: give input"),
        ({"input": ["missing.jsonl"]}, "input missing.jsonl does not exist"),
        ({"deduplication": {"exact": False, "minhash": None}}, "there is nothing to do"),
        ({"scores": {"scorer": "x", "no_such": 1}}, "scores"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_work(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "corpus")
    assert curate(recipe(tmp_path, **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/1-read").exists()


def test_a_filter_of_a_domain_that_no_document_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus")
    filters = [{"length": {"min_characters": 10_000, "only": ["prose", "tests"]}}]
    assert curate(recipe(tmp_path, filters=filters), "--until", "filters") == 2
    assert "filter length: only names tests, and no document of that domain was read" in capsys.readouterr().err


def test_filters_of_some_domains_keep_the_others(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    filters = [{"length": {"min_characters": 10_000, "only": ["prose"]}}]
    assert curate(recipe(tmp_path, filters=filters), "--until", "filters") == 0
    assert {row["metadata"]["domain"] for row in documents(tmp_path / "run/2-filters/kept")} == {"notes", "stars"}


def test_edits_of_texts_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "lines.jsonl"
    text = sentences(1, 8)
    corpus.write_text(
        json.dumps({"text": "no end mark\n" + text}) + "\n" + json.dumps({"text": "-----\n=====\n" + text})
    )
    filters = [{"symbol_lines": {}}, {"c4_quality": {}}]
    path = recipe(tmp_path, input=[str(corpus)], filters=filters, deduplication=None, weights=None)
    assert curate(path, "--until", "filters") == 0
    first, second = sorted(documents(tmp_path / "run/2-filters/kept"), key=lambda row: row["id"])
    assert first["text"] == second["text"] == text
    assert first["metadata"]["edited"] == {"c4_quality": [len(text) + 12, len(text)]}
    assert list(second["metadata"]["edited"]) == ["symbol_lines"]
    capsys.readouterr()
    assert curate(path, "--why", f"{corpus}:1") == 0
    assert f"c4_quality left {len(text):,} of {len(text) + 12:,} characters" in capsys.readouterr().out


def test_text_of_the_machine() -> None:
    items = dict(python_docs())
    assert "if" in items["topics/if"]().split()
    text = items["json/__init__.py"]()
    assert "JSON (JavaScript Object Notation)" in text and "Serialize ``obj`` to a JSON formatted ``str``" in text
    assert "import" not in text.split("\n")[0] and items["this.py"]() == ""
    packages = dict(python_packages())
    name = next(name for name in packages if name.startswith("datatrove-") and name.endswith("/description"))
    assert "DataTrove" in packages[name]()
