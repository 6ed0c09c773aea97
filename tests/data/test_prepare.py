"""`data prepare` writes the right tokens for each request, and nothing for a request that is wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qwen_moe.cli import main
from qwen_moe.data.corpus import Reading
from qwen_moe.data.encode import check_workers
from qwen_moe.data.manifest import read_manifest
from qwen_moe.data.output import OtherDataThere
from qwen_moe.data.tokenizer import load_tokenizer
from qwen_moe.errors import UserError
from tests.data.preparation import contents, prepare, write_corpus


def test_the_files_hold_the_tokens_of_every_document_closed(tmp_path: Path, tokenizer: Path) -> None:
    corpus, texts = write_corpus(tmp_path)
    prepared, done = prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert done
    plain = load_tokenizer(tokenizer)
    end = plain.token_to_id("<|endoftext|>")
    expected = [[*plain.encode(text, add_special_tokens=False).ids, end] for text in texts]
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(tmp_path / "out"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    assert all(tokens.count(end) == 1 for tokens in expected)
    assert prepared.documents == len(texts) and prepared.tokens == sum(map(len, expected))
    assert prepared.max_token_id == max(map(max, expected)) and prepared.end_of_document_id == end
    assert prepared.bin_sha256 == contents(tmp_path / "out")["out.bin"]


def test_there_are_no_more_workers_than_the_container_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("parallel.threads.cgroup_cpus", lambda root: 2.0)
    assert check_workers(0) == 2


def test_the_number_of_workers_does_not_show(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.data.encode._BATCH_CHARACTERS", 2000)
    corpus, _ = write_corpus(tmp_path)
    found = []
    for workers in (1, 3):
        prefix = tmp_path / str(workers) / "out"
        prepare([str(corpus)], prefix, tokenizer=tokenizer, workers=workers)
        found.append(contents(prefix))
    assert found[0] == found[1]


def test_again_does_nothing_and_another_request_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "workers": 1}
    prepare([str(corpus)], tmp_path / "out", **arguments)
    before = contents(tmp_path / "out")
    assert prepare([str(corpus)], tmp_path / "out", **arguments)[1] is False
    write_corpus(tmp_path, seed=5)
    with pytest.raises(UserError, match="--overwrite"):
        prepare([str(corpus)], tmp_path / "out", **arguments)
    assert contents(tmp_path / "out") == before
    assert prepare([str(corpus)], tmp_path / "out", overwrite=True, **arguments)[1] is True
    assert contents(tmp_path / "out") != before


def test_foreign_files_are_not_overwritten(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    (tmp_path / "out.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match="no manifest"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert (tmp_path / "out.bin").read_bytes() == b"precious"


def test_the_command_prints_one_json_document(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, texts = write_corpus(tmp_path)
    arguments = [
        "--input",
        str(corpus),
        "--output",
        str(tmp_path / "out"),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        "1",
    ]
    assert main(["data", "prepare", *arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["documents"] == len(texts) and facts["done"] is True
    assert main(["data", "info", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == facts["tokens"]


def test_equal_content_is_equal_data_wherever_and_whenever_it_was_written(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    first, _ = prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    os.utime(corpus, ns=(1, 1))
    again, done = prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    assert not done and again.content == first.content and again.request != first.request
    # The manifest now has the file's new time, so that nothing is hashed next time.
    assert read_manifest(tmp_path / "out") == again
    moved = tmp_path / "elsewhere.jsonl"
    corpus.rename(moved)
    assert prepare([str(moved)], tmp_path / "out", tokenizer=tokenizer)[1] is False
    content = bytearray(moved.read_bytes())
    content[20] ^= 1
    moved.write_bytes(content)
    with pytest.raises(OtherDataThere, match="--overwrite"):
        prepare([str(moved)], tmp_path / "out", tokenizer=tokenizer)


def test_data_whose_corpus_is_gone_is_used_by_a_run_and_not_taken_for_another(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, _ = write_corpus(tmp_path)
    prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    corpus.unlink()
    assert prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, gone=True)[1] is False
    assert "corpus.jsonl does not exist" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not exist"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(UserError, match="does not exist"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, gone=True, reading=Reading(text_key="other"))


@pytest.mark.parametrize("added", [True, False])
def test_a_tokenizer_that_cannot_keep_text_from_control_tokens_is_refused(tmp_path: Path, added: bool) -> None:
    """Its model has the control token in its own vocabulary, whether or not it is an added token, too."""
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "see": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if added:
        plain.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "t").mkdir()
    plain.save(str(tmp_path / "t" / "tokenizer.json"))
    corpus = tmp_path / "a.txt"
    corpus.write_text("see see")
    assert prepare([str(corpus)], tmp_path / "ok", tokenizer=tmp_path / "t")[0].tokens == 3
    corpus.write_text("see <|endoftext|> here")
    with pytest.raises(UserError, match=r"control token '<\|endoftext\|>' \(1\)"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tmp_path / "t")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (["--output", ""], "--output: ''"),
        (["--output", "FOLDER/"], "is a folder"),
        (["--output", "FOLDER/out.bin"], "give the prefix without it"),
        (["--output", "FOLDER/corpus.jsonl/out"], "corpus.jsonl"),
        (["--output", "FOLDER/" + "x" * 250], "too long"),
        (["--workers", "-1"], "--workers: '-1'"),
        (["--workers", "100000"], "--workers: '100000'"),
        (["--vocab-size", "300"], "--vocab-size 300"),
        (["--train-tokenizer", "--vocab-size", "0"], "at least 278"),
        (["--train-tokenizer", "--vocab-size", "-5"], "--vocab-size: '-5'"),
        (["--train-tokenizer", "--vocab-size", str(10**12)], "at most 2,147,483,647"),
        (["--train-tokenizer"], "needs --vocab-size"),
        (["--tokenizer", "FOLDER/none"], "none does not exist"),
        (["--input", "FOLDER/none"], "does not exist"),
        (["--input", "FOLDER/corpus.jsonl", "FOLDER/corpus.jsonl"], "twice"),
        (["--text-key", "body"], "--text-key"),
    ],
)
def test_a_mistake_has_one_message_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], changes: list[str], part: str
) -> None:
    write_corpus(tmp_path)
    changes = [change.replace("FOLDER", str(tmp_path)) for change in changes]
    given = {"--input": str(tmp_path / "corpus.jsonl"), "--output": str(tmp_path / "out"), "--workers": "1"}
    given |= {} if "--train-tokenizer" in changes else {"--tokenizer": str(tokenizer)}
    arguments = [word for key, value in given.items() if key not in changes for word in (key, value)]
    assert main(["data", "prepare", *arguments, *changes]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and part in message, message
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl"}


def test_a_missing_folder_is_made_and_what_was_left_out_is_told(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, _ = write_corpus(tmp_path)
    with corpus.open("a") as file:
        file.write('{"text": " "}\n{"text": 5}\n{"text": "\\ud800"}\n')
    (tmp_path / ".hidden.txt").write_text("x")
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "a" / "b" / "out"), "--tokenizer", str(tokenizer)]
    options = ["--workers", "1", "--on-bad-line", "skip", "--on-bad-utf8", "skip", "--json"]
    assert main(["data", "prepare", *arguments, *options]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["documents"] == 60 and facts["skipped"] == 2 and facts["files"] == 1
    assert facts["left_out"] == {"hidden": 1, "empty": 1, "malformed lines": 1, "not decodable": 1}
    assert f"1 malformed line ({corpus}, line 62)" in captured.err and ".hidden.txt" in captured.err
