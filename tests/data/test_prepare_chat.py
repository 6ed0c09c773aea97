"""`data chat` writes what each row becomes, the same for any number of workers, and refuses what cannot be learned from."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_moe.cli import main
from qwen_moe.data.chat import Chat
from qwen_moe.data.content import verify_content
from qwen_moe.data.examples import PackedExamples
from qwen_moe.data.manifest import PreparedData, column_path, read_manifest
from qwen_moe.data.rows import ExampleSet, Order
from qwen_moe.errors import UserError
from tests.data.chat_templates import THINKING, with_template

WORDS = ("alpha", "beta", "gamma", "δέλτα", "def", "👩🏽", "\n\n")
Row = dict[str, Any]


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + "."


def talk(rng: random.Random) -> Row:
    turns = [("user", "assistant")] * rng.randint(1, 3)
    return {"messages": [{"role": role, "content": text(rng)} for turn in turns for role in turn]}


def a_pair(rng: random.Random) -> Row:
    return {"prompt": text(rng), "chosen": text(rng), "rejected": text(rng) + "no"}


def rows(make: Any, count: int = 30, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    return [make(rng) for _ in range(count)]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def chat(tokenizer: Path, source: Path, output: Path, *more: str) -> int:
    given = ["--input", str(source), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", "1"]
    return main(["data", "chat", *given, *more])


def prepared(tokenizer: Path, folder: Path, lines: list[Any], *more: str) -> PreparedData:
    assert chat(tokenizer, write(folder / "in.jsonl", lines), folder / "out", *more) == 0
    found = read_manifest(folder / "out")
    assert found is not None
    return found


def refused(tokenizer: Path, folder: Path, lines: list[Any], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert chat(tokenizer, write(folder / "in.jsonl", lines), folder / "out", *more) == 2
    assert not list(folder.glob("out*"))
    return capsys.readouterr().err


def documents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """Tokens and what is learned of them, by document, read with megatron-core."""
    from qwen_moe.data.megatron import IndexedDatasetBuilder  # noqa: F401  (it imports what follows without the rest)
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # isort: skip

    dataset = IndexedDataset(str(prefix))
    learn = np.fromfile(column_path(prefix, "learn"), np.uint8)
    tokens = [dataset[n].tolist() for n in range(len(dataset))]
    ends = np.cumsum([len(ids) for ids in tokens])
    assert ends[-1] == len(learn)
    return [(ids, learn[end - len(ids) : end].tolist()) for ids, end in zip(tokens, ends)]


def test_each_document_is_a_conversation_and_the_column_what_is_learned(tokenizer: Path, tmp_path: Path) -> None:
    given = rows(talk)
    found = prepared(tokenizer, tmp_path, given)
    encoder = Chat(tokenizer)
    expected = [encoder.encode(encoder.read(row)[0]) for row in given]
    assert documents(tmp_path / "out") == [(e.ids.tolist(), e.learn.tolist()) for e in expected]
    assert (found.kind, found.documents, found.tokens) == ("chat", 30, sum(len(e.ids) for e in expected))
    assert found.counts == {
        "conversations": 30,
        "learned_tokens": sum(e.learned for e in expected),
        "longest": max(len(e.ids) for e in expected),
        "truncated": 0,
        "cut_tokens": 0,
        "cut_learned_tokens": 0,
    }
    assert found.max_token_id == max(e.ids.max() for e in expected)


def test_a_pair_is_two_documents_the_chosen_first(tokenizer: Path, tmp_path: Path) -> None:
    given = rows(a_pair)
    found = prepared(tokenizer, tmp_path, given)
    read = Chat(tokenizer).tokenizer
    answers = [
        read.decode([token for token, learn in zip(ids, learned) if learn])
        for ids, learned in documents(tmp_path / "out")
    ]
    assert answers == [f"{row[name]}<|im_end|>" for row in given for name in ("chosen", "rejected")]
    assert (found.kind, found.documents, found.counts["pairs"]) == ("pairs", 60, 30)


@pytest.mark.parametrize("make", [talk, a_pair])
def test_training_reads_what_was_written(tokenizer: Path, tmp_path: Path, make: Any) -> None:
    given = rows(make)
    found = prepared(tokenizer, tmp_path, given)
    sets = [ExampleSet(prefix=tmp_path / "out")]
    length = found.counts["longest"]
    rows_ = PackedExamples(sets, Order(length=length, epochs=2, seed=1), vocab_size=found.vocab_size, cache=tmp_path)
    batch = rows_.train_batch(0, len(rows_.rows))
    assert (batch["labels"] >= 0).sum() == 2 * found.counts["learned_tokens"]
    read = Chat(tokenizer).tokenizer
    for ids, labels, where in zip(batch["input_ids"], batch["labels"], range(len(rows_.rows))):
        for one in rows_.placed(where):
            at = slice(one.start, one.start + one.length)
            answers = read.decode(labels[at][labels[at] >= 0])
            row = given[one.example]
            if make is a_pair:
                expected = [row["rejected" if one.document % 2 else "chosen"]]
            else:
                expected = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            assert answers == "".join(f"{answer}<|im_end|>" for answer in expected)
            assert read.decode(ids[at]).endswith(f"{expected[-1]}<|im_end|>\n")


def test_the_number_of_workers_does_not_show(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.data.chat_rows._BATCH_BYTES", 500)
    source = write(tmp_path / "in.jsonl", [*rows(talk), {"messages": []}])
    contents = []
    for workers in ("1", "3"):
        prefix = tmp_path / workers / "out"
        assert chat(tokenizer, source, prefix, "--workers", workers, "--on-bad-line", "skip") == 0
        assert {path.name for path in prefix.parent.iterdir()} == {"out.bin", "out.idx", "out.json", "out.learn.bin"}
        contents.append([path.read_bytes() for path in sorted(prefix.parent.glob("*.bin"))])
        contents[-1].append(prefix.with_suffix(".idx").read_bytes())
    assert contents[0] == contents[1]


def test_again_does_nothing_and_another_request_is_refused(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared(tokenizer, tmp_path, rows(talk))
    source = tmp_path / "in.jsonl"
    os.utime(source, ns=(1, 1))
    assert chat(tokenizer, source, tmp_path / "out", "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["done"] is False and said["content"] == first.content
    for more in (("--learn", "last"), ("--learn", "all"), ("--length", "900"), ("--on-bad-line", "skip")):
        assert chat(tokenizer, source, tmp_path / "out", *more) == 2
        assert "other settings" in capsys.readouterr().err
    other = with_template(tokenizer, THINKING, tmp_path / "other")
    assert chat(other, source, tmp_path / "out") == 2
    assert chat(other, source, tmp_path / "out", "--overwrite") == 0
    found = read_manifest(tmp_path / "out")
    assert found is not None and found.template_sha256 != first.template_sha256 and found.bin_sha256 == first.bin_sha256


def test_a_damaged_column_is_noticed_and_made_again(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(tokenizer, tmp_path, rows(talk))
    column, info = tmp_path / "out.learn.bin", ["data", "info", str(tmp_path / "out"), "--check"]
    before, hashed = column.read_bytes(), verify_content(tmp_path / "out").sha256
    assert main(info) == 0
    assert "learned_tokens" in capsys.readouterr().out
    for damaged in (before[:-1], bytes([1 - before[0]]) + before[1:], None):
        column.unlink() if damaged is None else column.write_bytes(damaged)
        assert main(info) == 2
        assert "out.learn.bin" in capsys.readouterr().err
        assert chat(tokenizer, tmp_path / "in.jsonl", tmp_path / "out") == 0
        assert column.read_bytes() == before
    prepared(tokenizer, tmp_path, rows(talk), "--learn", "last", "--overwrite")
    assert verify_content(tmp_path / "out").sha256 != hashed


def test_text_in_its_place_leaves_no_column_behind(tokenizer: Path, tmp_path: Path) -> None:
    prepared(tokenizer, tmp_path, rows(talk))
    write(tmp_path / "text.jsonl", [{"text": "alpha"}])
    given = ["--input", str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(["data", "prepare", *given, "--tokenizer", str(tokenizer), "--overwrite"]) == 0
    assert not (tmp_path / "out.learn.bin").exists()
    assert verify_content(tmp_path / "out").columns == ()


def test_all_mistakes_are_counted_before_anything_is_tokenized(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_moe.data.chat.Chat.encode", None)
    good, equal = rows(talk, 3), {"prompt": "a", "chosen": "b", "rejected": "b"}
    lines = [good[0], "{", good[1], equal, {"messages": []}, {"messages": []}, a_pair(random.Random(1)), good[2]]
    message = refused(tokenizer, tmp_path, lines, capsys)
    assert "5 of 8 rows cannot be used: 1 not JSON" in message and "1 of another kind" in message
    assert "1 chosen equal to rejected" in message and "2 no messages" in message
    assert f"{tmp_path / 'in.jsonl'}, line 2: the line is not valid JSON" in message


def test_mistakes_that_only_the_template_shows_are_counted_too(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = with_template(tokenizer, THINKING, tmp_path / "thinking")
    thought = {"role": "assistant", "content": "hm</think>a"}
    turns = [{"role": "user", "content": "q"}, thought]
    message = refused(
        directory, tmp_path, [{"messages": turns}, {"messages": turns * 2}, {"messages": turns * 3}], capsys
    )
    assert "2 of 3 rows cannot be used: 2 earlier turns rewritten" in message
    assert "line 2" in message and "line 3" in message and "after message 2" not in message
    found = prepared(directory, tmp_path, [{"messages": turns}, {"messages": turns * 2}], "--on-bad-line", "skip")
    assert (found.documents, found.skipped, found.left_out) == (1, 1, {"earlier turns rewritten": 1})


def test_rows_that_are_left_out_are_counted_by_reason(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*rows(talk, 3), "{", {"messages": []}, {"messages": [1]}, b"".decode(), '{"prompt": "\\ud800"}']
    found = prepared(tokenizer, tmp_path, lines, "--on-bad-line", "skip")
    assert found.left_out == {"not JSON": 1, "no messages": 2, "not Unicode": 1} and found.skipped == 4
    assert found.documents == 3
    assert "line 4" in capsys.readouterr().err


def lengths(folder: Path) -> list[int]:
    return [len(ids) for ids, _ in documents(folder / "out")]


def test_conversations_that_are_too_long(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = rows(talk)
    prepared(tokenizer, tmp_path, given)
    whole = documents(tmp_path / "out")
    limit = sorted(lengths(tmp_path))[15]
    longer = sum(len(ids) > limit for ids, _ in whole)
    fine = tmp_path / "fine"
    fine.mkdir()
    message = refused(tokenizer, fine, given, capsys, "--length", str(limit))
    assert f"{longer} of 30 rows cannot be used: {longer} longer than --length" in message
    assert "--too-long drop or cut" in message and "skip" not in message
    refused(tokenizer, fine, given, capsys, "--length", str(limit), "--on-bad-line", "skip")
    found = prepared(tokenizer, fine, given, "--length", str(limit), "--too-long", "drop")
    assert documents(fine / "out") == [document for document in whole if len(document[0]) <= limit]
    assert found.left_out == {"longer than --length": longer} and found.counts["truncated"] == 0


def test_a_cut_is_at_the_end_and_counted(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"prompt": "alpha " * 30, "completion": "beta"}
    given = [*rows(talk), long]
    prepared(tokenizer, tmp_path, given)
    whole = documents(tmp_path / "out")
    found = prepared(tokenizer, tmp_path, given, "--length", "40", "--too-long", "cut", "--overwrite")
    cut = [(ids[:40], learn[:40]) for ids, learn in whole]
    kept = [document for document in cut if sum(document[1])]
    assert documents(tmp_path / "out") == kept and len(kept) < len(whole)
    lost = [(ids[40:], learn[40:]) for ids, learn in whole if sum(learn[:40]) and len(ids) > 40]
    assert found.counts["truncated"] == len(lost) > 3
    assert found.counts["cut_tokens"] == sum(len(ids) for ids, _ in lost)
    assert found.counts["cut_learned_tokens"] == sum(sum(learn) for _, learn in lost) > 0
    assert found.left_out == {"nothing left to learn after the cut": len(whole) - len(kept)}
    assert f"{len(lost)} truncated by" in capsys.readouterr().out


def test_pairs_are_never_cut_and_fit_together(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = rows(a_pair)
    for more in (("--length", "9", "--too-long", "cut"), ("--learn", "all")):
        assert "is not for pairs" in refused(tokenizer, tmp_path, given, capsys, *more)
    prepared(tokenizer, tmp_path, given)
    whole = lengths(tmp_path)
    sums = [chosen + rejected for chosen, rejected in zip(whole[::2], whole[1::2])]
    limit = sorted(sums)[15]
    found = prepared(tokenizer, tmp_path, given, "--length", str(limit), "--too-long", "drop", "--overwrite")
    assert found.counts["pairs"] == sum(size <= limit for size in sums) and found.counts["longest"] == limit
    assert chat(tokenizer, tmp_path / "in.jsonl", tmp_path / "new", "--length", str(limit)) == 2
    assert "its two answers with their prompts have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--too-long", "cut"), "needs --length"),
        (("--length", "0"), "expected a whole number, 1 or more"),
        (("--learn", "nothing"), "invalid choice"),
        (("--json", "--preview", "1"), "give one of them"),
    ],
)
def test_options_that_do_not_fit(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert message in refused(tokenizer, tmp_path, rows(talk, 2), capsys, *more)


def test_files_that_are_not_jsonl(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", rows(talk, 2))
    (folder / "README.md").write_text("about")
    assert chat(tokenizer, folder, tmp_path / "out") == 0
    found = read_manifest(tmp_path / "out")
    assert found is not None and found.documents == 2 and found.left_out == {"not JSONL": 1}
    (folder / "a.jsonl").unlink()
    for source in (folder, folder / "README.md", "python-stdlib"):
        assert chat(tokenizer, Path(source), tmp_path / "new") == 2
        assert "jsonl" in capsys.readouterr().err


def test_a_preview_marks_what_is_learned_and_obeys_no_data(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["{", {"prompt": "a\x1b[31m", "completion": "beta"}, {"prompt": "c", "completion": "d"}, *rows(talk, 3)]
    source = write(tmp_path / "in.jsonl", lines)
    given = ["data", "chat", "--input", str(source), "--tokenizer", str(tokenizer)]
    assert main([*given, "--preview", "2"]) == 0
    out, err = capsys.readouterr()
    shown = "<|im_start|>user\na\\x1b[31m<|im_end|>\n<|im_start|>assistant\n[[beta<|im_end|>]]\n"
    assert shown in out and out.count("--- ") == 2 and "\x1b" not in out and "line 1" in err
    assert list(tmp_path.iterdir()) == [source]
    assert main(given) == 2 and "--preview N" in capsys.readouterr().err
    write(source, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert main([*given, "--preview", "2"]) == 0
    assert "line 1, rejected: " in capsys.readouterr().out
    source.write_text("\n  \n")
    assert main([*given, "--preview", "2"]) == 2 and "there is no row" in capsys.readouterr().err


def test_a_preview_on_a_terminal_is_colored(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from qwen_moe.data.chat_rows import Rules
    from qwen_moe.data.prepare_chat import chat_request
    from qwen_moe.data.preview import preview

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    source = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b"}])
    request, out = chat_request((str(source),), Rules(tokenizer=tokenizer)), Terminal()
    preview(request, 1, out)
    assert "\x1b[32mb<|im_end|>\x1b[0m\n" in out.getvalue() and "[[" not in out.getvalue()


def test_kill_in_the_middle_then_again(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows(talk, 3000))
    command = [sys.executable, "-m", "qwen_moe", "data", "chat", "--input", str(source), "--workers", "1"]
    command += ["--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = tmp_path / "out.bin.partial"
    end = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.bin").exists() and not (tmp_path / "out.json").exists()
    for name in ("out", "undisturbed"):
        assert chat(tokenizer, source, tmp_path / name) == 0
    for ending in ("bin", "idx", "learn.bin"):
        assert (tmp_path / f"out.{ending}").read_bytes() == (tmp_path / f"undisturbed.{ending}").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_prefix_that_is_the_name_of_a_column_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    from qwen_moe.data.manifest import check_prefix_name

    with pytest.raises(UserError, match=r"ends in \.learn"):
        check_prefix_name(tmp_path / "out.learn")
