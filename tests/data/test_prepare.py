"""Preparing data: right tokens, the same for any number of workers, and never half there."""

import errno
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

from qwen_moe.cli import main
from qwen_moe.data.prepare import bin_path, idx_path, manifest_path, prepare
from qwen_moe.data.tokenizer import load_tokenizer, train_tokenizer
from qwen_moe.errors import UserError


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
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    corpus, texts = write_corpus(tmp_path)
    prepared, done = prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert done
    plain = load_tokenizer(tokenizer)
    end = plain.token_to_id("<|endoftext|>")
    expected = [[*plain.encode(text, add_special_tokens=False).ids, end] for text in texts]
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    assert all(tokens.count(end) == 1 for tokens in expected)
    assert prepared.documents == len(texts) and prepared.tokens == sum(map(len, expected))
    assert prepared.max_token_id == max(map(max, expected)) and prepared.end_of_document_id == end
    assert prepared.bin_sha256 == contents(tmp_path / "out")["out.bin"]


def test_the_number_of_workers_does_not_show(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.data.prepare._BATCH_CHARACTERS", 2000)
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
    corpus, _ = write_corpus(tmp_path, count=20_000)
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
