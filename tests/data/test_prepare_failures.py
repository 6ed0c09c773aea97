"""`data prepare` leaves whole files or none when it is killed or fails, and replaces damaged ones."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qwen_moe.data.prepare
from qwen_moe.cli import main
from qwen_moe.data.content import check_prefix
from qwen_moe.data.encode import in_order
from qwen_moe.data.manifest import (
    bin_path,
    idx_path,
    manifest_path,
    partial_path,
    read_manifest,
    trained_tokenizer_path,
)
from qwen_moe.data.output import OtherDataThere
from qwen_moe.data.tokenizer import tokenizer_hash
from qwen_moe.errors import UserError
from tests.data.preparation import contents, prepare, write_corpus


def test_a_truncated_output_is_made_again(tmp_path: Path, tokenizer: Path) -> None:
    corpus, _ = write_corpus(tmp_path)
    prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    before = contents(tmp_path / "out")
    with bin_path(tmp_path / "out").open("r+b") as file:
        file.truncate(100)
    assert prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)[1] is True
    assert contents(tmp_path / "out") == before


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
    """A mixture of files from two preparations is not read, and the same command repairs it."""

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
        # Leave what a kill leaves: nothing is cleaned up.
        patched.setattr("qwen_moe.data.prepare.no_partial_left", lambda prefix: contextlib.nullcontext())
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


def blocked(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def nothing(_: None) -> None:
    pass


def refuse(given: int) -> None:
    raise UserError(f"no such thing as {given}")


def test_an_interrupt_does_not_reach_a_worker_that_still_starts() -> None:
    """Ctrl-C reaches all processes of a terminal, and Python's start printed a traceback of its own."""
    assert all(in_order(blocked, iter(range(4)), 2, nothing, None))
    assert not blocked(0)


def test_a_worker_that_cannot_start_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    """It was reported as dead for want of memory, below a traceback."""
    with pytest.raises(UserError, match="no such thing as 7"):
        list(in_order(blocked, iter(range(4)), 2, refuse, 7))
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_dies_is_named(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, _ = write_corpus(tmp_path)
    monkeypatch.setattr("qwen_moe.data.encode._encode", die)
    with pytest.raises(UserError, match=r"tokenizing processes died.*fewer --workers"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=2)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("gone", [False, True])
def test_a_corpus_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """Otherwise the next command would take what was made of the old content for that of the new one."""
    corpus, _ = write_corpus(tmp_path)

    def change(*arguments: Any) -> Any:
        yield from real(*arguments)
        if gone:
            corpus.unlink()
        else:
            corpus.write_text('{"text": "other text"}\n')

    real = qwen_moe.data.prepare.encoded
    monkeypatch.setattr(qwen_moe.data.prepare, "encoded", change)
    with pytest.raises(UserError, match=r"corpus.jsonl was changed while it was read: wait until nothing writes it"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert not list(tmp_path.glob("out.*"))
