"""Preparing data: right tokens, the same for any number of workers, and never half there."""

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qwen_moe.cli import main
from qwen_moe.data.content import check_prefix
from qwen_moe.data.corpus import Reading
from qwen_moe.data.manifest import (
    PreparedData,
    bin_path,
    idx_path,
    manifest_path,
    partial_path,
    read_manifest,
    trained_tokenizer_path,
)
from qwen_moe.data.prepare import OtherDataThere, Request
from qwen_moe.data.prepare import prepare as prepare_request
from qwen_moe.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from qwen_moe.errors import UserError


def prepare(
    inputs: list[str], prefix: Path, *, workers: int = 1, overwrite: bool = False, gone: bool = False, **request: Any
) -> tuple[PreparedData, bool]:
    asked = Request(inputs=tuple(inputs), **request)
    return prepare_request(asked, prefix, workers=workers, overwrite=overwrite, without_inputs=gone)


def write_corpus(folder: Path, count: int = 60, seed: int = 0) -> tuple[Path, list[str]]:
    rng = random.Random(seed)
    texts = [
        " ".join(rng.choices(["alpha", "beta", "gamma", "<|endoftext|>", "δέλτα"], k=rng.randint(1, 200)))
        for _ in range(count)
    ]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(["alpha beta gamma δέλτα def return import"] * 3, 290, path)
    return path


def contents(prefix: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (bin_path(prefix), idx_path(prefix))}


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


def test_a_truncated_output_is_made_again(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    before = contents(tmp_path / "out")
    with bin_path(tmp_path / "out").open("r+b") as file:
        file.truncate(100)
    assert prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)[1] is True
    assert contents(tmp_path / "out") == before


def test_foreign_files_are_not_overwritten(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    (tmp_path / "out.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match="no manifest"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert (tmp_path / "out.bin").read_bytes() == b"precious"


def test_kill_in_the_middle_then_again(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path, count=5_000)
    command = [sys.executable, "-m", "qwen_moe", "data", "prepare", "--input", str(corpus), "--workers", "1"]
    command += ["--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = tmp_path / "out.bin.partial"
    end = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not bin_path(tmp_path / "out").exists() and not manifest_path(tmp_path / "out").exists()
    prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    prepare([str(corpus)], tmp_path / "undisturbed", tokenizer=tokenizer, workers=1)
    assert list(contents(tmp_path / "out").values()) == list(contents(tmp_path / "undisturbed").values())
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_nothing_and_is_named(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from qwen_moe.data.megatron import IndexedDatasetBuilder

    corpus, _ = write_corpus(tmp_path)
    calls = []

    def full(self: Any, tensor: Any, mode: int = 0) -> None:
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedDatasetBuilder, "add_item", full)
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
    assert main(["data", "prepare", *arguments]) == 2
    message = capfd.readouterr().err
    assert "error: " in message and "No space left" in message and "Traceback" not in message
    assert not list(tmp_path.glob("out*"))


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
    # Now it is known by its status, and nothing is hashed.
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


def test_damaged_output_is_made_again(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, _ = write_corpus(tmp_path)
    prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    before = contents(tmp_path / "out")
    for path in (bin_path(tmp_path / "out"), idx_path(tmp_path / "out")):
        damaged = bytearray(path.read_bytes())
        damaged[-3] ^= 4
        path.write_bytes(damaged)
        assert prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)[1] is True
        assert str(path) in capsys.readouterr().err
        assert contents(tmp_path / "out") == before


def test_damaged_output_is_not_replaced_by_that_of_another_request(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    damaged = bin_path(tmp_path / "out").read_bytes()[:-2]
    bin_path(tmp_path / "out").write_bytes(damaged)
    write_corpus(tmp_path, seed=5)
    with pytest.raises(OtherDataThere):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    assert bin_path(tmp_path / "out").read_bytes() == damaged
    corpus.unlink()
    with pytest.raises(UserError, match=r"does not exist.*needed: .*out\.bin has"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, gone=True)


def test_every_bit_of_the_manifest_counts(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    prepared, _ = prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer)
    path = manifest_path(tmp_path / "out")
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert read_manifest(tmp_path / "out") == prepared
        except UserError as error:
            assert "out.json" in str(error) and "--overwrite" in str(error)
    for content in (b"", b"[]", b"5", b"[" * 100_000, whole.replace(b'"files": 1', b'"files": true')):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a manifest"):
            read_manifest(tmp_path / "out")
    again, done = prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert done and replace(again, bin_mtime_ns=0) == replace(prepared, bin_mtime_ns=0)


@pytest.mark.parametrize("stop", range(1, 6))
def test_stopped_while_files_are_put_in_place(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """What is then there of two preparations is not read, and the same command puts it right."""

    class Killed(BaseException):
        pass

    corpus, texts = write_corpus(tmp_path)
    prefix = tmp_path / "out"
    prepare([str(corpus)], prefix, vocab_size=290)
    corpus.write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in texts))
    calls = []
    move = os.replace

    def killed(source: Path, target: Path) -> None:
        if not str(target).endswith(("tokenizer.new", ".json.partial")):
            calls.append(target)
        if len(calls) == stop:
            raise Killed
        move(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)
        # What a kill leaves, not what an exception cleans up.
        patched.setattr("qwen_moe.data.prepare._no_partial_left", lambda prefix: contextlib.nullcontext())
        if stop < 5:
            with pytest.raises(Killed):
                prepare([str(corpus)], prefix, vocab_size=290, overwrite=True)
    if stop < 5:
        assert len(calls) == stop and partial_path(manifest_path(prefix)).exists()
        with pytest.raises(UserError, match="interrupted"):
            check_prefix(prefix)
        assert prepare([str(corpus)], prefix, vocab_size=290)[1] is True
    else:
        prepare([str(corpus)], prefix, vocab_size=290, overwrite=True)
    prepare([str(corpus)], tmp_path / "b" / "out", vocab_size=290)
    assert contents(prefix) == contents(tmp_path / "b" / "out")
    assert tokenizer_hash(trained_tokenizer_path(prefix)) == tokenizer_hash(tmp_path / "b" / "out-tokenizer")
    names = {"out.bin", "out.idx", "out.json", "out-tokenizer"}
    assert {path.name for path in tmp_path.glob("out*")} == names


def test_a_failed_preparation_leaves_the_tokenizer_of_the_data_that_are_there(tmp_path: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    prepare([str(corpus)], tmp_path / "out", vocab_size=290)
    before = tokenizer_hash(trained_tokenizer_path(tmp_path / "out"))
    with corpus.open("a") as file:
        file.write("not JSON\n" * 3)
    with pytest.raises(UserError, match="is not JSON"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=285, overwrite=True)
    assert tokenizer_hash(trained_tokenizer_path(tmp_path / "out")) == before
    assert check_prefix(tmp_path / "out")[0] == 60
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.new"), *tmp_path.glob("*.lock")]


def test_a_second_preparation_waits_and_finds_the_first(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer), range(4)))
    assert sorted(done for _, done in found) == [False, False, False, True]
    assert len({prepared.bin_sha256 for prepared, _ in found}) == 1
    assert {path.name for path in tmp_path.glob("out*")} == {"out.bin", "out.idx", "out.json"}


def die(texts: list[str]) -> None:
    os._exit(1)


def test_a_worker_that_dies_is_named(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, _ = write_corpus(tmp_path)
    monkeypatch.setattr("qwen_moe.data.encode._encode", die)
    with pytest.raises(UserError, match=r"tokenizing processes died.*fewer --workers"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=2)
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_that_cannot_keep_text_from_control_tokens_is_refused(tmp_path: Path) -> None:
    """One whose model has the control token among its own words."""
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "see": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "t").mkdir()
    plain.save(str(tmp_path / "t" / "tokenizer.json"))
    corpus = tmp_path / "a.txt"
    corpus.write_text("see other")
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
        (["--tokenizer", "FOLDER/none"], "tokenizer.json"),
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
    assert f"1 malformed lines ({corpus}, line 62)" in captured.err and ".hidden.txt" in captured.err
