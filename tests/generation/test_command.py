"""`qwen-moe generate` on files of prompts: the same answers after a stop, in a chat, and from several processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.cli import main
from qwen_moe.errors import UserError
from qwen_moe.generation import launch
from qwen_moe.generation import prompts as module
from qwen_moe.generation.prompts import Answers
from qwen_moe.line_file import LineFile

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}.{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
LINES = [
    {"prompt": "abc", "id": 7},
    {"tokens": [1, 2, 3]},
    {"prompt": "hello there", "kind": {"nested": [1]}},
    {"messages": [{"role": "user", "content": "hi"}]},
]


@pytest.fixture(scope="module")
def chat(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "hf"
    shutil.copytree(folders[0], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def generate(checkpoint: Path, *arguments: object) -> int:
    settings = ["--max-new-tokens", "6", "--samples", "2", "--temperature", "1"]
    return main(["generate", "--checkpoint", str(checkpoint), *settings, *map(str, arguments)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(path: Path) -> list[list[list[int]]]:
    """The tokens of all answers. Their log-probabilities differ in the last bits from one batch to another."""
    return [[answer["tokens"] for answer in row["completions"]] for row in read(path)]


def test_a_file_of_prompts(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    assert generate(chat, "--input", source, "--output", out) == 0
    assert "answers to 4 prompts" in capsys.readouterr().out
    rows = read(out)
    assert [{key: row[key] for key in line} for row, line in zip(rows, LINES, strict=True)] == LINES
    assert [row["index"] for row in rows] == [0, 1, 2, 3] and not list(tmp_path.glob("*.partial"))
    for row in rows:
        assert len(row["completions"]) == 2
        for answer in row["completions"]:
            assert len(answer["tokens"]) == len(answer["log_probs"]) <= 6 and max(answer["log_probs"]) <= 0
    # A batch of another size draws the same.
    assert generate(chat, "--input", source, "--output", tmp_path / "again.jsonl", "--batch-size", 2) == 0
    assert drawn(tmp_path / "again.jsonl") == drawn(out)


def test_a_conversation_is_what_the_template_makes_of_it(chat: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [LINES[3], {"prompt": "user hi.a "}]), tmp_path / "out.jsonl"
    assert generate(chat, "--input", source, "--output", out, "--temperature", 0) == 0
    first, second = drawn(out)
    assert first == second
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "hi"}, LINES[3]]), tmp_path / "chat.jsonl"
    assert generate(chat, "--input", source, "--output", out, "--temperature", 0, "--chat") == 0
    assert drawn(out) == [first] * 2


ENDS_TURNS = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "options", "said"), [(ENDS_TURNS, [], 1), (ENDS_TURNS, ["--chat"], 0), (TEMPLATE, [], 0)]
)
def test_plain_text_for_a_model_of_conversations_is_noted(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, options: list[str], said: int
) -> None:
    shutil.copytree(chat, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    arguments = ["generate", "--checkpoint", str(tmp_path / "hf"), "--max-new-tokens", "2", *options]
    assert main([*arguments, "--prompt", "abc"]) == 0
    prompts = write(tmp_path / "prompts.jsonl", LINES)
    assert main([*arguments, "--input", str(prompts), "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert capsys.readouterr().err.count("--chat asks them as a user") == 2 * said


def test_a_stopped_command_goes_on(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    assert generate(chat, "--input", source, "--output", tmp_path / "whole.jsonl") == 0
    add, written = Answers.add, []

    def killed(answers: Answers, index: int, row: Any) -> None:
        if len(written) == 2:
            with (tmp_path / "out.jsonl.partial").open("a") as file:
                file.write('{"index": 3, "pro')  # a line that was cut off
            raise KeyboardInterrupt
        written.append(index)
        add(answers, index, row)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", killed)
        assert generate(chat, "--input", source, "--output", out) == 130
    assert not out.exists()
    made = []
    monkeypatch.setattr(Answers, "add", lambda answers, index, row: (made.append(index), add(answers, index, row)))
    assert generate(chat, "--input", source, "--output", out) == 0
    assert sorted(made + written) == [0, 1, 2, 3] and drawn(out) == drawn(tmp_path / "whole.jsonl")


def test_a_begun_file_of_other_settings(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    with Answers(out, {"prompts": "else", "dtype": None}):
        pass
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    assert generate(chat, "--input", source, "--output", out) == 2
    message = capsys.readouterr().err
    assert "was begun with other settings (" in message and "prompts else is now" in message
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_a_begun_file_with_a_setting_that_is_left_out_now(tmp_path: Path) -> None:
    with Answers(tmp_path / "out", {"a": 1, "compile": True}):
        pass
    with pytest.raises(UserError, match=r"other settings \(compile True is now None\)"):
        Answers(tmp_path / "out", {"a": 1})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'{"index": 0, "pro\n', "line 2 is not valid JSON"),
        (b"\xff\n", "line 2 is damaged: it is not UTF-8 text"),
        (b'{"prompt": "a"}\n', "line 2 is damaged: remove it, and its prompt is answered again"),
    ],
)
def test_a_damaged_line_of_a_begun_file(tmp_path: Path, damage: bytes, message: str) -> None:
    with Answers(tmp_path / "out", {"a": 1}), (tmp_path / "out.partial").open("ab") as file:
        file.write(damage)
    with pytest.raises(UserError, match=message):
        Answers(tmp_path / "out", {"a": 1})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no prompts"),
        (["{"], "line 1 is not valid JSON"),
        ([{"prompt": "a"}, "[1]"], "line 2 must hold a JSON object"),
        ([{"text": "a"}], 'line 1 has no prompt: give one of "prompt"'),
        ([{"prompt": "a", "tokens": [1]}], "line 1 has prompt and tokens"),
        ([{"prompt": ""}], "line 1: prompt is empty"),
        ([{"prompt": 3}], "line 1: prompt is 3, expected text"),
        ([{"tokens": [1, True]}], "line 1: tokens must be a list of ids"),
        (
            [{"prompt": "a", "index": 0}, {"prompt": "b", "index": 0}],
            "line 2: index is 0, and the output has the number",
        ),
        ([{"prompt": "a", "index": "x"}], "line 1: index is 'x', and the output has the number of the line"),
        ([{"tokens": []}], "the prompt is empty"),
        ([{"tokens": [99999]}], "token 99999 but the model's vocabulary"),
        ([{"tokens": [1] * 60}], "66, more than the model's reach of 64"),
        ([{"messages": "hi"}], "line 1: messages must be a list of messages"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages must be a list of messages"),
    ],
)
def test_bad_lines(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Any], message: str
) -> None:
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert generate(chat, "--input", source, "--output", out) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_bad_options(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", LINES[:1])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "there.jsonl").touch()
    for arguments, message in (
        (("--input", source), "--input and --output belong together"),
        (("--prompt", "a", "--output", tmp_path / "x"), "--input and --output belong together"),
        (("--input", source, "--output", tmp_path / "there.jsonl"), "exists: give another file"),
        (("--input", source, "--output", tmp_path / "no" / "out"), "no does not exist"),
        (("--input", tmp_path / "none", "--output", tmp_path / "x"), "none cannot be read: No such file"),
        (("--prompt-file", tmp_path / "none"), "none does not exist"),
        (("--prompt-file", tmp_path / "binary"), "binary cannot be read: it is not UTF-8 text"),
        (("--prompt", "a", "--chat"), "has no chat template"),
        (("--prompt", "a", "--stop", ""), "stop is ('',)"),
        (("--prompt", "a", "--context-extension", "yarn"), "the model reaches 64 tokens and the longest text has 7"),
        (("--prompt", "a", "--tp", "3"), "model.num_attention_heads"),
    ):
        assert generate(folders[0], *arguments) == 2, arguments
        assert message in capsys.readouterr().err, arguments


def test_a_split_that_does_not_fit_is_refused_before_any_process_starts(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "one_machine", lambda *_, **__: pytest.fail("processes were about to start"))
    assert generate(folders[0], "--prompt", "a", "--pp", 9) == 2
    assert "layers cannot fill pp 9 stages: lower --pp" in capsys.readouterr().err


def test_long_prompts_from_a_file(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("hello there " * 30)
    arguments = ("--prompt-file", tmp_path / "book.txt", "--samples", 1)
    assert generate(folders[0], *arguments) == 2
    assert "more than the model's reach of 64 tokens" in capsys.readouterr().err
    for extension in ("yarn", "dca", "auto"):
        assert generate(folders[0], *arguments, "--context-extension", extension, "--attention", "sparse") == 0
        assert 0 < len(capsys.readouterr().out.strip()) <= 6


def test_processes_of_a_split_model_draw_the_same(chat: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", LINES)
    assert generate(chat, "--input", source, "--output", tmp_path / "one.jsonl", "--dtype", "fp64") == 0
    command = [sys.executable, "-m", "qwen_moe", "generate", "--checkpoint", str(chat), "--input", str(source)]
    command += [
        "--output",
        str(tmp_path / "two.jsonl"),
        "--max-new-tokens",
        "6",
        "--samples",
        "2",
        "--temperature",
        "1",
    ]
    done = subprocess.run([*command, "--dtype", "fp64", "--tp", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answers to 4 prompts") == 1
    assert drawn(tmp_path / "two.jsonl") == drawn(tmp_path / "one.jsonl")


# With --tp 2 the shares were those of half of the heads, and with --pp 2 those of the first stage's layers.
@pytest.mark.parametrize("degree", ["--tp", "--pp"])
def test_shares_of_a_split_model_are_those_of_all_its_heads_and_layers(
    degree: str, folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, lines = tmp_path / "model", []
    shutil.copytree(folders[0], model)
    config = json.loads((model / "config.json").read_text())
    budgets = [{str(head): ["vertical_and_slash", 31, 101, 1.0] for head in range(4)} for _ in range(2)]
    config["dual_chunk_attention_config"] = {
        "chunk_size": 64,
        "local_size": 8,
        "sparse_attention_threshold": 100,
        "sparse_attention_last_q": 8,
        "sparse_attention_config": budgets,
    }
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2000}))
    (tmp_path / "book.txt").write_text("hello there of old " * 70)
    command = ["generate", "--checkpoint", str(model), "--max-new-tokens", "2", "--dtype", "fp64"]
    command += ["--prompt-file", str(tmp_path / "book.txt"), "--attention", "sparse", "--kept-share", "0.05"]
    for split in ([], [degree, "2"]):
        assert main([*command, *split]) == 0
        said = capfd.readouterr().err.splitlines()
        lines.append([line for line in said if line.startswith("sparse attention kept")])
    assert lines[0] == lines[1] and len(lines[0]) == 1


def test_the_file_of_answers_is_never_half_there(tmp_path: Path) -> None:
    with Answers(tmp_path / "out", {"a": 1}) as answers:
        answers.add(1, {"x": 2})
        answers.add(0, {"x": 3})
    with Answers(tmp_path / "out", {"a": 1}) as answers:
        assert answers.done == {0, 1}
        answers.finish()
    assert (tmp_path / "out").read_text() == '{"index": 0, "x": 3}\n{"index": 1, "x": 2}\n'
    with pytest.raises(UserError, match="exists"):
        module.Answers(tmp_path / "out", {"a": 1})


def test_two_processes_do_not_write_one_file_of_answers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Answers(out, {"a": 1}) as answers:
        answers.add(0, {"x": 2})
        for settings in ({"a": 1}, {"a": 2}):  # equal settings would go on where the first one is
            with pytest.raises(UserError, match=r"out\.partial is being written by .*: wait for it, or give another"):
                Answers(out, settings)
        answers.add(1, {"x": 3})
        answers.finish()
    assert out.read_text() == '{"index": 0, "x": 2}\n{"index": 1, "x": 3}\n'


def test_a_second_process_that_comes_when_the_first_has_just_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def finish_first(path: Path, *more: Any) -> LineFile:
        out.write_text("the first one's\n")
        return LineFile(path, *more)

    monkeypatch.setattr(module, "LineFile", finish_first)
    with pytest.raises(UserError, match="exists: give another file"):
        Answers(out, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and out.read_text() == "the first one's\n"
