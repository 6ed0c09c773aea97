"""`qwen-moe score`: what each row gets, the same after a stop, and how scores agree with judgments."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.checkpoint.huggingface.convert import save_pretrained
from qwen_moe.cli import main
from qwen_moe.data.chat import Chat
from qwen_moe.data.tokenizer import read_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.generation.prompts import Answers
from qwen_moe.scoring import command
from qwen_moe.scoring.model import ScoringModel, open_reward_model, trained_weights
from tests.models.hf_reference import draw_weights
from tests.scoring.conftest import CRITERIA
from tests.small import small_model

CHATS = [
    {"messages": [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "beta gamma"}], "id": 7},
    {"prompt": "def", "completion": "return import"},
]
PAIRS = [
    {"prompt": f"alpha {n}", "chosen": "beta " * (n % 4 + 1), "rejected": "gamma", "preferences": judged}
    for n, judged in enumerate([{"helpful": 1}, {"helpful": -1, "concise": 1}, {"concise": -1}, {"helpful": 1}] * 2)
]
ROWS = [*CHATS, *PAIRS, {"prompt": "beta", "chosen": "def", "rejected": "gamma"}]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def score(checkpoint: Path, source: Path, output: Path, *more: object) -> int:
    given = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output)]
    return main(["score", *given, *map(str, more)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(hf: Path, row: dict[str, Any]) -> list[dict[str, float]]:
    """The scores of each of a row's conversations, at the token that ends the last answer."""
    chat, scoring = Chat(hf), ScoringModel.load(hf, dtype="fp64")
    found = []
    for conversation in chat.read(row):
        ids = chat.encode(conversation).ids.tolist()
        end = max(place for place, token in enumerate(ids) if token == chat.end)
        found.append(dict(zip(CRITERIA, scoring.scores([ids[: end + 1]])[0].tolist(), strict=True)))
    return found


def test_rows_get_the_scores_of_their_answers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    hf, checkpoint = folders
    source = write(tmp_path / "in.jsonl", ROWS)
    assert score(checkpoint, source, tmp_path / "out.jsonl", "--weights", "concise=3,helpful=1") == 0
    rows = read(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    for row, given in zip(rows, ROWS, strict=True):
        wanted = expected(hf, given)
        pair = len(wanted) == 2
        scores = [row["scores"][name] for name in ("chosen", "rejected")] if pair else [row["scores"]]
        weighted = [row["score"][name] for name in ("chosen", "rejected")] if pair else [row["score"]]
        for got, one, total in zip(scores, wanted, weighted, strict=True):
            assert got == pytest.approx(one, rel=1e-10, abs=1e-10)
            assert total == pytest.approx((one["helpful"] + 3 * one["concise"]) / 4, rel=1e-10, abs=1e-10)


def test_agreement_with_judgments(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plot = write(tmp_path / "in.jsonl", ROWS), tmp_path / "calibration.png"
    assert score(folders[0], source, tmp_path / "out.jsonl", "--plot", plot, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert plot.read_bytes().startswith(b"\x89PNG") and summary["pairs"] == 9
    rows = read(tmp_path / "out.jsonl")
    for name in CRITERIA:
        judged = [row for row in rows if name in row.get("preferences", {})]
        better = [
            row["scores"]["chosen"][name] > row["scores"]["rejected"][name]
            if row["preferences"][name] == 1
            else row["scores"]["chosen"][name] < row["scores"]["rejected"][name]
            for row in judged
        ]
        found = summary["agreement"][name]
        assert found["judged"] == len(judged) > 3 and found["accuracy"] == pytest.approx(sum(better) / len(better))
        assert 0 <= found["calibration_error"] <= 1
    assert summary["agreement"]["weighted"]["judged"] == 1


def test_agreement_by_kind(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["math", "chat", "math", "code", None, 7, "chat", "math"]
    pairs = [pair | {"kind": kind} for pair, kind in zip(PAIRS, kinds, strict=True)]
    source = write(tmp_path / "in.jsonl", pairs)
    assert score(folders[0], source, tmp_path / "out.jsonl", "--json") == 0
    found = json.loads(capsys.readouterr().out)["agreement_by_kind"]
    assert list(found) == ["chat", "code", "math"]
    rows = read(tmp_path / "out.jsonl")
    for kind, of in found.items():
        for name in CRITERIA:
            judged = [row for row in rows if row["kind"] == kind and name in row["preferences"]]
            assert (name in of) == bool(judged)
            scores = [[row["scores"][part][name] for part in ("chosen", "rejected")] for row in judged]
            right = [(a - b) * row["preferences"][name] > 0 for row, (a, b) in zip(judged, scores, strict=True)]
            if judged:
                assert of[name]["judged"] == len(judged)
                assert of[name]["accuracy"] == pytest.approx(sum(right) / len(judged))
    assert score(folders[0], source, tmp_path / "again.jsonl") == 0
    said = capsys.readouterr().out
    accuracy = found["math"]["helpful"]["accuracy"]
    assert f"math helpful          2 {accuracy:9.1%}" in said


def test_a_stopped_command_goes_on(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, settings = write(tmp_path / "in.jsonl", ROWS), ("--dtype", "fp32", "--batch-tokens", 1)
    assert score(folders[1], source, tmp_path / "whole.jsonl", *settings) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    original, scored = Answers.add, []

    def stopped(answers: Answers, index: int, row: Any) -> None:
        if index == 6:
            raise UserError("stopped")
        scored.append(index)
        original(answers, index, row)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", stopped)
        assert score(folders[1], source, tmp_path / "out.jsonl", *settings) == 2
    assert scored == [0, 1, 2, 3, 4, 5] and not (tmp_path / "out.jsonl").exists()
    read_again: list[int] = []
    reading = ScoringModel.scores

    def counted(model: ScoringModel, conversations: Any, done: Any = None) -> torch.Tensor:
        read_again.append(len(conversations))
        return reading(model, conversations, done)

    monkeypatch.setattr(ScoringModel, "scores", counted)
    assert score(folders[1], source, tmp_path / "out.jsonl", *settings) == 0
    assert read_again == [2 * 5] and "6 of 11 rows have their scores already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_another_checkpoint_or_file_does_not_go_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "out.jsonl.partial").write_text(json.dumps({"checkpoint": "other"}) + "\n")
    assert score(folders[0], source, tmp_path / "out.jsonl") == 2


def test_bad_rows_are_counted_before_work_starts(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [CHATS[0], "{", {"prompt": "a"}, {"prompt": "alpha", "completion": "beta " * 400}, {"messages": []}]
    assert score(folders[0], write(tmp_path / "in.jsonl", wrong), tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "4 of 5 rows cannot be scored" in error and "1 lacking keys" in error and "in.jsonl, line 2" in error
    assert not list(tmp_path.glob("out*"))


def test_an_index_that_is_not_the_number_of_the_row(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "index": index} for row, index in zip(CHATS, (0, 0), strict=True)]
    assert score(folders[0], write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl") == 2
    assert (
        "line 2: index is 0, and the output has the number of the line under this key, here 1"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("helpful=1", "--weights names helpful, but the model scores by helpful, concise"),
        ("helpful=1,concise=x", "'concise=x' is not NAME=NUMBER"),
        ("helpful=0,concise=0", "not all of them 0"),
        ("helpful=-1,concise=1", "numbers of at least 0"),
        ("helpful=nan,concise=1", "numbers of at least 0"),
    ],
)
def test_weights_that_are_refused(weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.parse_weights(weights, CRITERIA)


def test_reward_models_and_language_models_are_told_apart(
    folders: tuple[Path, Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language = tmp_path / "language"
    save_pretrained(draw_weights(small_model(), 1, torch.float32), language, tokenizer=read_tokenizer(tokenizer))
    assert score(language, write(tmp_path / "in.jsonl", CHATS), tmp_path / "out.jsonl") == 2
    assert "is a language model, which has no scores" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(folders[0]), "--prompt", "alpha"]) == 2
    assert "is a reward model, which scores texts by helpful, concise" in capsys.readouterr().err


def test_a_plot_without_pairs_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", CHATS)
    assert score(folders[0], source, tmp_path / "out.jsonl", "--plot", tmp_path / "p.png") == 2
    assert "has no pairs" in capsys.readouterr().err


def test_criteria_are_weighted_as_in_training(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert trained_weights(open_reward_model(folders[1])) is None
    trained = tmp_path / "trained"
    shutil.copytree(folders[1], trained)
    settings = {"objective": {"kind": "reward_model", "reward": {"criteria": list(CRITERIA), "weights": [2.0, 0.5]}}}
    state = {"step": 1, "consumed_samples": 0, "consumed_tokens": 0, "data_fingerprint": "", "settings": settings}
    (trained / "train_state.json").write_text(json.dumps(state))
    opened = open_reward_model(folders[1])
    assert trained_weights(type(opened)(trained, opened.config, opened.source, opened.dtype)) == (2.0, 0.5)
